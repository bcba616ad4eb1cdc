"""Checks that gradients and weights are finite, before they are used or saved."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sparsify.settings.base_config import UserError

REMEDY = "set max_grad_norm and resume from a checkpoint, or start again with a lower lr"


def check_gradient(grad_norm: Tensor, n_samples: int) -> None:
    """Raise a `UserError` if the norm of a gradient is not finite; a GPU is waited for."""
    if not math.isfinite(value := grad_norm.item()):
        raise UserError(
            f"grad_norm is {value} after {n_samples} samples, before the optimizer step; {REMEDY}"
        )


def check_weights(weights: Iterable[Tensor], n_samples: int) -> None:
    """Raise a `UserError` if a weight is not finite; a GPU is waited for."""
    values = (weight._values() if weight.is_sparse else weight for weight in weights)
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise UserError(
            f"weights or gradients are no longer finite after {n_samples} samples and are not "
            f"saved; {REMEDY}"
        )
