"""The runs that are named on the command line."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify.runs.config import SAERunConfig
from sparsify.runs.run_folder import CONFIG_FILE
from sparsify.scripts.cli import read_sae_run
from sparsify.settings.base_config import UserError


@dataclass(frozen=True)
class SavedRun:
    """A run to be evaluated."""

    path: Path
    """A run folder, which means its newest checkpoint, or one checkpoint in it."""

    config: SAERunConfig
    """Settings of the run."""

    device: str
    """Device to evaluate it on, or auto."""


def find_runs(
    paths: Sequence[Path], n_samples: int | None, device: str, trust_remote_code: bool = False
) -> list[SavedRun]:
    """The runs at some paths, to be evaluated on `n_samples` sequences on `device`.

    Args:
        paths: Run folders and checkpoints.
        n_samples: Sequences. None: as many as the run's config says.
        device: As in the config of a run.
        trust_remote_code: As on the command line of a run.

    Raises:
        UserError: There is no run at a path, it has no text to be evaluated on, or is named twice.
    """
    runs: dict[Path, SavedRun] = {}
    for path in paths:
        if not os.path.exists(path):  # False where `Path.exists` would raise
            raise UserError(f"{path}: there is no such file or folder; check the path")
        if path.resolve() in runs:
            raise UserError(f"{path}: is given twice; give each run once")
        folder = path if path.is_dir() else path.parent
        if not (folder / CONFIG_FILE).exists():
            raise UserError(
                f"{path}: is not a run: there is no {CONFIG_FILE} in '{folder}'; give the folder "
                "of a run that trained SAEs, or a checkpoint in it"
            )
        config = read_sae_run(folder)
        if config.eval_data is None:
            raise UserError(
                f"{folder / CONFIG_FILE}: has no eval_data, so there is no text to evaluate on; "
                "set it there"
            )
        changes = {
            "eval_n_samples": n_samples or config.eval_n_samples,
            "trust_remote_code": trust_remote_code,
        }
        runs[path.resolve()] = SavedRun(path, config.model_copy(update=changes), device)
    return list(runs.values())
