"""Recent training batches, to which SAEs fit what they use outside training."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.losses.passes import Passes
from sparsify.saes.base import SAE
from sparsify.training.random_state import get_random_state, set_random_state

N_SAMPLES = 512
"""Samples that are kept, in whole batches. Their L0 differs by 15 % from sequence to sequence."""
N_ROWS = 16_384
"""Tokens of them that SAEs are fitted to, at most one more for each batch."""

Batch = TypeVar("Batch")


class RecentBatches(Generic[Batch]):
    """Keeps recent training batches, and fits SAEs to them where their kind needs it.

    The batches themselves are kept, and run again to fit: what an SAE read when they were trained
    on came from earlier SAEs as they were then. Fitted to that, the second of three SAEs with k 39
    had 26 elements active after 50 batches.

    Args:
        saes: SAEs that are trained, by position.
        forward: The passes of a batch, restricted to what counts.
        batch_size: Samples in a batch.
    """

    def __init__(
        self, saes: Mapping[str, SAE], forward: Callable[[Batch], Passes], batch_size: int
    ) -> None:
        self.saes = {position: sae for position, sae in saes.items() if sae.is_fitted}
        self.forward = forward
        self._batches: deque[Batch] = deque(maxlen=-(-N_SAMPLES // batch_size))
        self._are_fitted = False

    def add(self, batch: Batch) -> None:
        """Keep a batch that was trained on."""
        if self.saes:
            self._batches.append(batch)
            self._are_fitted = False

    @torch.no_grad()
    def fit(self) -> None:
        """Fit SAEs to the batches, with the weights as they are.

        Leaves the global random generators as they were.
        """
        if self._are_fitted or not self._batches:
            return
        random = get_random_state()
        inputs: dict[str, list[Tensor]] = {position: [] for position in self.saes}
        n_rows = -(-N_ROWS // len(self._batches))
        for number, batch in enumerate(self._batches):
            acts = self.forward(batch).sae_acts
            for position, kept in inputs.items():
                kept.append(drawn_rows(acts[position].input.flatten(end_dim=-2), n_rows, number))
        for position, sae in self.saes.items():
            sae.fit(torch.cat(inputs[position]))
        set_random_state(random)
        self._are_fitted = True

    def state_dict(self) -> list[Batch]:
        """Return the batches."""
        return list(self._batches)

    def load_state_dict(self, batches: Iterable[Batch]) -> None:
        """Continue from what `state_dict` returned."""
        self._batches.clear()
        self._batches.extend(batches)
        self._are_fitted = False


def drawn_rows(rows: Float[Tensor, "all d_act"], n: int, seed: int) -> Float[Tensor, "some d_act"]:
    """At most n rows, drawn at random by a generator of their own.

    Rows at equal distances could hold the first tokens of all sequences, often outliers, or none.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:n].to(rows.device)]
