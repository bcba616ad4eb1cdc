"""Learning-rate schedules: linear warmup, then constant, cosine, or constant with a linear end."""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sparsify.training.config import TrainingConfig


def calc_lr_factor(step: int, config: TrainingConfig) -> float:
    """Fraction of `lr` with which optimizer step number `step` (the first is 0) is taken.

    Samples are turned into steps by whole effective batches. The warmup starts from exactly 0. The
    cosine would reach `min_lr_factor` at the step after the last; the linear fall would reach 0
    there, and stays at `min_lr_factor` from where it meets it.
    """
    n_steps = config.n_steps
    n_warmup = config.warmup_samples // config.samples_per_step
    if step < n_warmup:
        return step / n_warmup
    if config.lr_schedule == "cosine":
        progress = min(1.0, (step - n_warmup) / max(1, n_steps - n_warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return config.min_lr_factor + (1 - config.min_lr_factor) * cosine
    if config.lr_schedule == "linear":
        n_cooldown = n_steps - n_warmup
        if config.cooldown_samples is not None:
            n_cooldown = config.cooldown_samples // config.samples_per_step
        return max(config.min_lr_factor, min(1.0, (n_steps - step) / max(1, n_cooldown)))
    return 1.0


def build_lr_schedulers(optimizers: Sequence[Optimizer], config: TrainingConfig) -> list[LambdaLR]:
    """One scheduler per optimizer: each follows the same curve from its own learning rate."""
    return [
        LambdaLR(optimizer, lambda step: calc_lr_factor(step, config)) for optimizer in optimizers
    ]
