"""Factors of the coefficients of loss terms in the course of training."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes

FAST, SLOW = 10, 50
"""Steps over which the two running means of log L0 are taken; they differ by its trend."""
INTEGRAL_GAIN = 0.03
PROPORTIONAL_GAIN = 5.0
MAX_ERROR = 1.0
"""Beyond a factor of e an error counts no more in the sum."""
MAX_PULL = 1.5
"""Limit of what is added for the time being, so that the first steps do not kill an SAE."""
MAX_SUM = 14.0
"""Limit of the sum, a factor of a million."""
STEPS_TO_TARGET = 700
"""Nothing is summed up while L0 is on its way to its target and will be there in so many steps."""


class L0Controller:
    """Moves a sparsity coefficient until the SAE has a requested L0.

    With e = log(L0 / target), where L0 is a running mean, each step adds INTEGRAL_GAIN * e to a
    sum, which so comes to what the coefficient's logarithm must change by. As L0 follows the
    coefficient only after some, and in a JumpReLU SAE some hundred, steps, the sum alone would
    swing: PROPORTIONAL_GAIN * e is added for the time being, and the sum rests while L0 moves
    towards its target fast enough. All of it stays on the device.

    Args:
        target: Active elements per token.
        device: Where the codes are.
    """

    def __init__(self, target: float, device: torch.device) -> None:
        self.target = target
        self.first = torch.tensor(math.nan, device=device)
        """log(L0 / target) of the first step."""
        self.fast = torch.tensor(math.nan, device=device)
        self.slow = torch.tensor(math.nan, device=device)
        self.sum = torch.zeros((), device=device)

    def update(self, l0: Tensor, progress: float = 1.0) -> None:
        """Take note of a step's mean number of active elements per token.

        Args:
            l0: That number.
            progress: How far the target has moved, from 0, the first L0, to 1, where it stays.
        """
        distance = (l0 / self.target).clamp(min=1e-3).log()
        self.first = torch.where(self.first.isnan(), distance, self.first)
        error = distance - (1 - progress) * self.first.nan_to_num(0.0)
        error = torch.where(error.isnan(), self.fast.nan_to_num(0.0), error)  # there was no token
        self.fast = torch.where(self.fast.isnan(), error, self.fast.lerp(error, 1 / FAST))
        self.slow = torch.where(self.slow.isnan(), error, self.slow.lerp(error, 1 / SLOW))
        slope = (self.fast - self.slow) / (SLOW - FAST)
        is_approaching = (self.fast * slope < 0) & (self.fast.abs() < STEPS_TO_TARGET * slope.abs())
        change = INTEGRAL_GAIN * self.fast.clamp(-MAX_ERROR, MAX_ERROR)
        self.sum = (self.sum + change.where(~is_approaching, 0.0)).clamp(-MAX_SUM, MAX_SUM)

    @property
    def factor(self) -> Tensor:
        """Factor of the coefficient."""
        pull = (PROPORTIONAL_GAIN * self.fast.nan_to_num(0.0)).clamp(-MAX_PULL, MAX_PULL)
        return (self.sum + pull).exp()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that the next factors depend on."""
        return {"first": self.first, "fast": self.fast, "slow": self.slow, "sum": self.sum}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned."""
        self.first = state["first"].to(self.first)
        self.fast = state["fast"].to(self.fast)
        self.slow = state["slow"].to(self.slow)
        self.sum = state["sum"].to(self.sum)


class Coefficients:
    """Factor of the coefficient of each term, from its schedule and controllers.

    Args:
        losses: The terms.
        positions: Where SAEs write.
        n_samples: Samples of the whole run.
        device: Where the codes are.
    """

    def __init__(
        self, losses: LossConfig, positions: Iterable[str], n_samples: int, device: torch.device
    ) -> None:
        self.n_samples = n_samples
        self.n_done = 0
        self.schedules = {
            name: term.schedule for name, term in losses.terms().items() if term.schedule
        }
        self.coeffs = {name: term.position_coeff for name, term in losses.terms().items()}
        target = losses.sparsity.target_l0 if losses.sparsity else None
        self.target_warmup = losses.sparsity.target_warmup_samples if losses.sparsity else 0
        self.controllers = {
            position: L0Controller(target, device) for position in positions if target is not None
        }

    def factor(self, term: str, position: str) -> float | Tensor:
        """The factor of a term at a position, "" if it has none."""
        factor: float | Tensor = 1.0
        if (schedule := self.schedules.get(term)) is not None:
            factor = schedule.factor(self.n_done, self.n_samples)
        if term == "sparsity" and position in self.controllers:
            factor = factor * self.controllers[position].factor
        return factor

    def update(self, passes: Passes, n_samples: int) -> None:
        """Take note of a step that ended after `n_samples`."""
        self.n_done = n_samples
        progress = min(1.0, n_samples / self.target_warmup) if self.target_warmup else 1.0
        for position, controller in self.controllers.items():
            c = passes.sae_acts[position].c.detach()
            controller.update(torch.count_nonzero(c) / c[..., 0].numel(), progress)

    def metrics(self) -> dict[str, float]:
        """Coefficients that change, as they are now."""
        metrics = {
            f"coeff/train/{name}": self.coeffs[name] * schedule.factor(self.n_done, self.n_samples)
            for name, schedule in self.schedules.items()
        }
        for position in self.controllers:
            factor = self.factor("sparsity", position)
            metrics[f"coeff/train/sparsity/{position}"] = self.coeffs["sparsity"] * float(factor)
        return metrics

    def state_dict(self) -> dict[str, Any]:  # of several types
        """Return the state that the next factors depend on."""
        return {
            "n_done": self.n_done,
            "controllers": {
                position: controller.state_dict()
                for position, controller in self.controllers.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.n_done = state["n_done"]
        for position, controller in self.controllers.items():
            controller.load_state_dict(state["controllers"][position])
