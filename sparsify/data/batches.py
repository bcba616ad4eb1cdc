"""Interface between a training loop and its data, whatever a batch holds."""

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

Batch_co = TypeVar("Batch_co", covariant=True)


class Loader(Protocol[Batch_co]):
    """Batches in an order that can be resumed."""

    def __iter__(self) -> Iterator[Batch_co]:
        """Iterate from the first batch, or, the first time after `load_state_dict`, from there."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the last batch given, as `torch.load(weights_only=True)` can."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration resume where `state_dict` was called."""
        ...

    def close(self) -> None:
        """End the iteration, and whatever reads for it."""
        ...
