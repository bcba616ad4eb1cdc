"""Disk space that the checkpoints of a run take, and what to do when there is too little.

The estimate is of tensors, which are nearly all of it.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from sparsify.runs.console import say
from sparsify.runs.resume import folder_to_write_to
from sparsify.runs.run_folder import existing_parent
from sparsify.settings.base_config import UserError
from sparsify.training.config import TrainingConfig
from sparsify.training.memory import in_mb, n_bytes


@dataclass(frozen=True)
class DiskUse:
    """Bytes that checkpoints take.

    Attributes:
        first: Of the first one.
        whole: Of the whole run, when it takes most. Checkpoints by the clock are not counted.
        n_checkpoints: How many checkpoints these are.
    """

    first: int
    whole: int
    n_checkpoints: int


def estimate_disk(
    config: TrainingConfig, saved: nn.Module, trained: Iterable[Tensor], n_samples_done: int = 0
) -> DiskUse:
    """Bytes that the checkpoints of a run take.

    Args:
        config: How many there are, and how many keep their state.
        saved: What each keeps the weights of.
        trained: Its parameters that an optimizer moves. For each, a checkpoint keeps two tensors of
            the optimizer, and between two steps a gradient.
        n_samples_done: Samples trained on before, in a resumed run.
    """
    n_weights = n_bytes(saved.state_dict().values())
    n_state = n_bytes(trained) * (2 if config.n_accumulation_steps == 1 else 3)
    n_samples = config.n_batches * config.batch_size - n_samples_done
    period = max(config.save_every_n_samples or n_samples, config.batch_size)
    n_checkpoints = max(1, -(-n_samples // period))
    # A new state is written before an old one is removed.
    n_states = min(n_checkpoints, config.keep_last + 1)
    whole = n_checkpoints * n_weights + n_states * n_state
    return DiskUse(n_weights + n_state, whole, n_checkpoints)


def check_disk(
    config: TrainingConfig, saved: nn.Module, trained: Iterable[Tensor], n_samples_done: int
) -> str:
    """See that the disk has room for all checkpoints of a run. For arguments see `estimate_disk`.

    Raises:
        UserError: It has not.
    """
    if (folder := folder_to_write_to(config)) is None:
        return "save_dir is null: the run writes no files"
    use = estimate_disk(config, saved, trained, n_samples_done)
    free = _free_disk(folder)
    if use.whole > free:
        raise UserError(_disk_is_short(folder, "checkpoints", use.whole, free))
    clock = ""
    if config.save_every_minutes is not None:
        clock = f", not counting those of every {config.save_every_minutes:g} minutes"
    return (
        f"{use.n_checkpoints} checkpoint{'s' * (use.n_checkpoints > 1)} of {in_mb(use.whole)} in "
        f"all{clock}; {in_mb(free)} free"
    )


def check_disk_at_start(
    config: TrainingConfig, saved: nn.Module, trained: Iterable[Tensor], n_samples_done: int = 0
) -> None:
    """See that the disk has room for a checkpoint, and warn if it has not for all of the run.

    For arguments see `estimate_disk`.

    Raises:
        UserError: The first one would not fit.
    """
    if (folder := folder_to_write_to(config)) is None:
        return
    use = estimate_disk(config, saved, trained, n_samples_done)
    free = _free_disk(folder)
    if use.first > free:
        raise UserError(_disk_is_short(folder, "the next checkpoint", use.first, free))
    if use.whole > free:
        say(f"warning: {_disk_is_short(folder, 'checkpoints', use.whole, free)}")


def _free_disk(save_dir: Path) -> int:
    return shutil.disk_usage(existing_parent(save_dir)).free


def _disk_is_short(save_dir: Path, what: str, size: int, free: int) -> str:
    return (
        f"save_dir: {what} of the run would take about {in_mb(size)}, but the disk of "
        f"'{save_dir}' has {in_mb(free)} free; make room, choose another save_dir, or raise "
        "save_every_n_samples"
    )
