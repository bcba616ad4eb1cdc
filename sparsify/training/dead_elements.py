"""Dead dictionary elements: which they are, and how they are reset.

Resampling is that of Bricken et al. 2023 ("Towards Monosemanticity", appendix): a dead element
comes to read and write in the direction of an input that the SAE reconstructs badly.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim import Optimizer

from sparsify.losses.passes import Passes
from sparsify.saes.acts import SAEActs
from sparsify.saes.base import SAE, NewElements
from sparsify.saes.firing import FiringCounter
from sparsify.training.config import DeadElementsConfig


class DeadElements:
    """Counts, for each SAE, since when its elements have not fired, and how often they do.

    Args:
        config: When an element is dead.
        saes: The SAEs by position.
    """

    def __init__(self, config: DeadElementsConfig, saes: Mapping[str, SAE]) -> None:
        self.config = config
        devices = {position: next(sae.parameters()).device for position, sae in saes.items()}
        self.n_since = {
            position: torch.zeros(sae.n_dict, dtype=torch.int64, device=devices[position])
            for position, sae in saes.items()
        }
        """Tokens since each element fired."""
        self.counters = {
            position: FiringCounter(sae.n_dict, devices[position]) for position, sae in saes.items()
        }
        self.is_rare = {
            position: torch.zeros_like(n_since, dtype=torch.bool)
            for position, n_since in self.n_since.items()
        }
        """Elements that fired on too few tokens of the last whole stretch."""

    def update(self, passes: Passes) -> None:
        """Count the firings of a batch."""
        for position, acts in passes.sae_acts.items():
            codes = acts.c.detach().flatten(end_dim=-2)
            counts = torch.count_nonzero(codes, dim=0)
            n_since = self.n_since[position]
            n_since.add_(len(codes)).masked_fill_(counts > 0, 0)
            if self.config.min_density == 0:
                continue
            counter = self.counters[position]
            counter.add(counts, len(codes))
            if counter.n_tokens >= self.config.after_n_tokens:
                density = counter.counts / counter.n_tokens
                self.is_rare[position] = density < self.config.min_density
                counter.reset()

    def dead(self, position: str) -> Bool[Tensor, " n_dict"]:
        """Return which elements of an SAE are dead."""
        has_not_fired = self.n_since[position] >= self.config.after_n_tokens
        return has_not_fired | self.is_rare[position]

    def marked(self, passes: Passes) -> Passes:
        """The passes, with the elements that are dead."""
        return replace(passes, dead={position: self.dead(position) for position in self.n_since})

    def forget(self, position: str, elements: Bool[Tensor, " n_dict"]) -> None:
        """Count elements as if they had just fired."""
        self.n_since[position].masked_fill_(elements, 0)
        self.is_rare[position] &= ~elements
        # In the stretch that is on, as if they had fired just often enough before.
        counter = self.counters[position]
        counter.counts.masked_fill_(elements, math.ceil(self.config.min_density * counter.n_tokens))

    def metrics(self) -> dict[str, float]:
        """The number of dead elements of each SAE."""
        return {
            f"sparsity/train/dead_elements/{position}": float(self.dead(position).sum())
            for position in self.n_since
        }

    def state_dict(self) -> dict[str, Any]:  # of several types
        """Return the state that the next counts depend on."""
        return {
            "n_since": self.n_since,
            "is_rare": self.is_rare,
            "counters": {
                position: counter.state_dict() for position, counter in self.counters.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for position, counter in self.counters.items():
            self.n_since[position].copy_(state["n_since"][position])
            self.is_rare[position].copy_(state["is_rare"][position])
            counter.load_state_dict(state["counters"][position])


@torch.no_grad()
def resample(
    sae: SAE, acts: SAEActs, dead: Bool[Tensor, " n_dict"], optimizer: Optimizer
) -> Bool[Tensor, " n_dict"]:
    """Reset dead elements of an SAE to inputs of this batch; the others do not change.

    An input is drawn for each with a chance in proportion to the square of its squared error. No
    input is taken twice, since equal elements would get equal gradients for ever: if there are more
    dead elements than different inputs, some stay dead. The optimizer forgets what it knew of the
    parameters of those that are reset.

    Args:
        sae: Whose elements.
        acts: What it did on the batch.
        dead: Which elements are dead.
        optimizer: Adam, of the SAE's parameters.

    Returns:
        The elements that were reset.
    """
    index = dead.nonzero().flatten()
    if len(index) == 0:
        return dead
    inputs, targets = acts.input.flatten(end_dim=-2), acts.target.flatten(end_dim=-2)
    errors = (targets - acts.output.flatten(end_dim=-2)).square().sum(dim=-1)
    # In units of the largest, as its square may be too much for float32.
    chances = (errors / errors.max().clamp(min=1e-30)).square() + 1e-12
    drawn = torch.multinomial(chances, min(len(index), len(chances)))
    drawn = drawn[_firsts(inputs[drawn])]
    index = index[: len(drawn)]
    sae.reset_elements(NewElements(index, inputs[drawn], targets[drawn], inputs.mean(dim=0)))
    for parameter in sae.element_parameters():
        for value in optimizer.state[parameter].values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[index] = 0.0
    return torch.zeros_like(dead).index_fill_(0, index, True)


def _firsts(rows: Float[Tensor, "row width"]) -> Int[Tensor, " different"]:
    """The place of the first row of each kind of equal ones, in order."""
    different, kind = torch.unique(rows, dim=0, return_inverse=True)
    places = torch.arange(len(rows), device=rows.device)
    firsts = places.new_full((len(different),), len(rows))
    return firsts.scatter_reduce_(0, kind, places, "amin").sort().values
