"""What stops a run whose numbers are not finite, before they are saved."""

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparsify.runs.run_folder import replace_atomically
from sparsify.settings.base_config import UserError

REMEDY = "set max_grad_norm and go on from a checkpoint, or start anew with a lower lr"


def check_loss(
    loss: Tensor,
    terms: Mapping[str, Tensor],
    tokens: Tensor,
    n_samples: int,
    run_dir: Path | None,
    *,
    is_watched: bool,
) -> None:
    """See that the loss of a batch is finite; a GPU is waited for.

    Args:
        loss: The weighted sum.
        terms: The value of each term, by term and position.
        tokens: What the loss is of. Where it is not finite they are written to the run folder.
        n_samples: Samples trained on before.
        run_dir: Folder of the run. None: nothing is written.
        is_watched: Whether every batch before was looked at too.

    Raises:
        UserError: It is not. The message names the term and its position.
    """
    if torch.isfinite(loss):
        return
    bad = {name: value.item() for name, value in terms.items() if not torch.isfinite(value)}
    name, value = next(iter(bad.items()), ("", loss.item()))
    batch = "The batch"
    if run_dir is not None:
        path = run_dir / f"bad_batch_{n_samples}.safetensors"
        with suppress(OSError, SafetensorError), replace_atomically(path) as temporary:
            save_file({"tokens": tokens.cpu()}, temporary)
        if path.exists():
            batch = f"The batch, whose tokens are in {path},"
    blame = "has not been trained on" if is_watched else "or one since the last log line, is why"
    raise UserError(
        f"loss{f'/train/{name}' if name else ''} is {value} after {n_samples} samples. "
        f"{batch} {blame}; {REMEDY}"
    )


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
