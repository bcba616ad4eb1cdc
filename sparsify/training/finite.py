"""What stops a run whose numbers are not finite, before they reach the weights."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsify.base_config import UserError

REMEDY = "lower lr or set max_grad_norm"


def check_loss(
    loss: Tensor, terms: Mapping[str, Tensor], tokens: Tensor, n_samples: int, run_dir: Path | None
) -> None:
    """See that the loss of a batch is finite; a GPU is waited for.

    Args:
        loss: The weighted sum.
        terms: The value of each term, by term and position.
        tokens: What the loss is of. Where it is not finite they are written to the run folder.
        n_samples: Samples trained on before.
        run_dir: Folder of the run. None: nothing is written.

    Raises:
        UserError: It is not. The message names the term and its position.
    """
    if torch.isfinite(loss):
        return
    bad = {name: value.item() for name, value in terms.items() if not torch.isfinite(value)}
    name, value = next(iter(bad.items()), ("", loss.item()))
    batch = "its batch"
    if run_dir is not None:
        path = run_dir / f"bad_batch_{n_samples}.safetensors"
        save_file({"tokens": tokens.cpu()}, path)
        batch = f"its batch, whose tokens are in {path},"
    raise UserError(
        f"loss{f'/train/{name}' if name else ''} is {value} after {n_samples} samples; {batch} has "
        f"not been trained on. Look at it, or {REMEDY} and go on from a checkpoint"
    )


def check_gradient(grad_norm: Tensor, n_samples: int) -> None:
    """Raise a `UserError` if the norm of a gradient is not finite; a GPU is waited for."""
    if not math.isfinite(value := grad_norm.item()):
        raise UserError(
            f"grad_norm is {value} after {n_samples} samples, before the optimizer step; {REMEDY} "
            "and go on from a checkpoint"
        )
