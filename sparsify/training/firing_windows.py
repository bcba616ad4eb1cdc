"""Alive dictionary elements, counted over stretches of training."""

from collections.abc import Mapping
from typing import Any

from sparsify.losses.passes import Passes
from sparsify.saes.base import SAE
from sparsify.saes.firing import FiringCounter
from sparsify.training.cadence import Every


class FiringWindows:
    """Counts alive dictionary elements over stretches of training tokens.

    Args:
        saes: SAEs by position.
        every_n_samples: Samples between the beginnings of two stretches. None: there are none.
        n_tokens: Length of a stretch.
    """

    def __init__(self, saes: Mapping[str, SAE], every_n_samples: int | None, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.begins = Every(every_n_samples)
        self.counters = {
            position: FiringCounter(sae.n_dict, next(sae.parameters()).device)
            for position, sae in saes.items()
        }
        self.is_open = False

    def update(self, passes: Passes, n_samples: int) -> dict[str, float]:
        """Count a batch if a stretch is on; the alive elements if it ends, else nothing."""
        if self.begins.due(n_samples):
            self.is_open = True
        if not self.is_open:
            return {}
        for position, acts in passes.sae_acts.items():
            self.counters[position].update(acts.c)
        if next(iter(self.counters.values())).n_tokens < self.n_tokens:
            return {}
        alive = {
            f"sparsity/alive_dict_elements/{position}": float(counter.n_alive)
            for position, counter in self.counters.items()
        }
        for counter in self.counters.values():
            counter.reset()
        self.is_open = False
        return alive

    def state_dict(self) -> dict[str, Any]:  # of several types
        """Return the state that the next counts depend on, in addition to the number of samples."""
        counters = {position: counter.state_dict() for position, counter in self.counters.items()}
        return {"is_open": self.is_open, "counters": counters}

    def load_state_dict(self, state: Mapping[str, Any], n_samples: int) -> None:
        """Go on from what `state_dict` returned after `n_samples`."""
        self.is_open = state["is_open"]
        self.begins = Every(self.begins.period, n_samples)
        for position, counter in self.counters.items():
            counter.load_state_dict(state["counters"][position])
