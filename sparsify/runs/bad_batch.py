"""Stops a run whose loss is not finite, and keeps the batch for whoever looks for the reason."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparsify.runs.run_folder import replace_atomically
from sparsify.settings.base_config import UserError
from sparsify.training.batch_loss import BatchLoss
from sparsify.training.finite import REMEDY

BAD_BATCHES = "bad_batch_*"


def check_loss(
    loss: BatchLoss,
    batch: Mapping[str, Tensor],
    n_samples: int,
    run_dir: Path | None,
    *,
    is_watched: bool,
) -> None:
    """See that the loss of a batch is finite; a GPU is waited for.

    Args:
        loss: Of the batch.
        batch: Its tensors by name. Where the loss is not finite they are written to the run folder.
        n_samples: Samples trained on before.
        run_dir: Folder of the run. None: nothing is written.
        is_watched: Whether every batch before was looked at too.

    Raises:
        UserError: It is not. The message names the term and its position.
    """
    if torch.isfinite(loss.total):
        return
    bad = {name: value.item() for name, value in loss.terms.items() if not torch.isfinite(value)}
    name, value = next(iter(bad.items()), ("", loss.total.item()))
    kept = "The batch"
    if run_dir is not None:
        path = run_dir / f"bad_batch_{n_samples}.safetensors"
        with suppress(OSError, SafetensorError), replace_atomically(path) as temporary:
            save_file({name: tensor.cpu() for name, tensor in batch.items()}, temporary)
        if path.exists():
            kept = f"The batch, whose {' and '.join(batch)} are in {path},"
    blame = "has not been trained on" if is_watched else "or one since the last log line, is why"
    raise UserError(
        f"loss{f'/train/{name}' if name else ''} is {value} after {n_samples} samples. "
        f"{kept} {blame}; {REMEDY}"
    )
