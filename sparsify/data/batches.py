"""Batches of any kind: the interface of a training loop to its data, and tensors in memory."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsify.settings.base_config import UserError

MAX_COUNT = 2**63
"""Numbers below are what NumPy can count."""

Batch_co = TypeVar("Batch_co", covariant=True)


def saved_count(state: Mapping[str, Any], name: str) -> int:
    """Return a number of things that a loader has saved.

    Raises:
        ValueError: It is not there, or no such number.
    """
    value = state.get(name)
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise ValueError(f"loader.{name} is {type(value).__name__}, or not from 0 to {MAX_COUNT}")
    return value


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


class TensorBatches:
    """A `Loader` of tensors in memory: passes over their rows, each in an order of its own.

    The last batch of a pass is left out if it is short. The order is a function of seed and pass.

    Args:
        tensors: Tensors with a row for each sample. A batch is a tuple of the same rows of each.
        batch_size: Samples in a batch.
        seed: Seed of the order.
        n_epochs: Passes over the rows. None: no end.

    Raises:
        UserError: The tensors differ in length, or have fewer rows than a batch.
    """

    def __init__(
        self, *tensors: Tensor, batch_size: int, seed: int, n_epochs: int | None = None
    ) -> None:
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1:
            raise UserError(f"data: tensors of {sorted(lengths)} rows; give equally many of each")
        (self.n_rows,) = lengths
        if self.n_rows < batch_size:
            raise UserError(
                f"data: {self.n_rows} samples are less than one batch of {batch_size}; use more "
                "data or a smaller batch_size"
            )
        self.tensors = tensors
        self.batch_size = batch_size
        self.seed = seed
        self.n_epochs = n_epochs
        self._n_given = self._next_start = 0

    @property
    def n_batches_per_epoch(self) -> int:
        """Whole batches in a pass over the rows."""
        return self.n_rows // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Iterate from the first batch, or, the first time after `load_state_dict`, from there."""
        self._n_given, self._next_start = self._next_start, 0
        while self.n_epochs is None or self._n_given < self.n_epochs * self.n_batches_per_epoch:
            epoch, index = divmod(self._n_given, self.n_batches_per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
            rows = torch.from_numpy(order[index * self.batch_size : (index + 1) * self.batch_size])
            self._n_given += 1
            yield tuple(tensor[rows] for tensor in self.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches given."""
        return {"n_given": self._n_given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration resume where `state_dict` was called."""
        self._n_given = self._next_start = saved_count(state, "n_given")

    def close(self) -> None:
        """Do nothing: there is nothing to let go of."""
