"""Resuming a run: which one, from which checkpoint, and whether its config suits it."""

import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsify.runs.checkpoints import (
    MANIFEST_NAME,
    NUMBERED_NAME,
    Checkpoint,
    load_checkpoint,
)
from sparsify.runs.console import say
from sparsify.runs.run_folder import CONFIG_FILE, RESULT_FILE
from sparsify.runs.weight_files import STATE_NAME, WEIGHTS_NAME, numbered_files
from sparsify.settings.base_config import UserError, read_yaml, validate_config
from sparsify.settings.differences import differing_settings
from sparsify.settings.secrets import one_line
from sparsify.training.config import NEWEST_RUN, TrainingConfig

TEMPORARY_FILES = ".*.tmp"


def checkpoint_to_resume(config: TrainingConfig, kept_settings: Iterable[str]) -> Checkpoint:
    """Return the checkpoint that `config.resume` means; warns about newer ones that are damaged.

    Args:
        config: Settings to resume the run with.
        kept_settings: Names of settings that the saved state holds or depends on: another value
            would not fit it or have no effect.

    Raises:
        UserError: There is none, or `config` does not suit it.
    """
    assert config.resume is not None
    checkpoint = load_checkpoint(find_run(config.resume, config.save_dir, type(config)))
    for message in checkpoint.damaged:
        say(f"warning: {message}; it is left out")
    check_can_resume(config, checkpoint, kept_settings)
    return checkpoint


def folder_to_write_to(config: TrainingConfig) -> Path | None:
    """The folder of the resumed run, or where a new one makes its own. None: no files.

    Raises:
        UserError: `config.resume` means no run, or one that leads out of its folder.
    """
    if config.resume is None:
        return config.save_dir
    path = find_run(config.resume, config.save_dir, type(config))
    folder = path.parent if NUMBERED_NAME.fullmatch(path.name) else path
    if os.path.isdir(folder):  # which is else reported where it is read
        _check_has_no_links(folder)
    return folder


def find_run(resume: Path, save_dir: Path | None, config_class: type[TrainingConfig]) -> Path:
    """Return the path that `resume` means: itself, or the newest resumable run in `save_dir`.

    Only runs whose config is a `config_class` count.
    """
    if str(resume) != NEWEST_RUN:
        return resume
    folders = save_dir.iterdir() if save_dir is not None and save_dir.is_dir() else ()
    written = {
        max(manifest.stat().st_mtime_ns for manifest in manifests): folder
        for folder in folders
        if folder.is_dir()
        and (manifests := numbered_files(folder, MANIFEST_NAME))
        and _is_of_kind(folder, config_class)
    }
    if not written:
        raise UserError(
            f"resume: no run in save_dir '{save_dir}' has a checkpoint to resume from; start one "
            "without resume, or give the folder of a run"
        )
    return written[max(written)]


def check_can_resume(
    config: TrainingConfig, checkpoint: Checkpoint, kept_settings: Iterable[str]
) -> None:
    """See that `config` suits a run's checkpoint.

    Args:
        config: Settings to resume the run with.
        checkpoint: Where it is.
        kept_settings: Names of the settings that must be as they were.

    Raises:
        UserError: It does not.
    """
    path = checkpoint.run_dir / CONFIG_FILE
    try:
        before = validate_config(type(config), read_yaml(path), str(path)).model_dump(mode="json")
    except UserError as error:
        raise UserError(
            f"resume: '{checkpoint.run_dir}' is not a run of this script, or its config is damaged;"
            f" give another run\n{error}"
        ) from None
    now = config.model_dump(mode="json")
    changes = [
        c for name in kept_settings for c in differing_settings(name, before[name], now[name])
    ]
    if changes:
        raise UserError(
            f"resume: a run is resumed with the settings in {path}, but given are "
            f"{', '.join(changes)}; remove the change, or start a new run without resume"
        )
    if config.n_batches * config.batch_size < checkpoint.n_samples:
        n_least = -(-checkpoint.n_samples // config.samples_per_step) * config.samples_per_step
        raise UserError(
            f"n_samples ({config.n_samples}) must be at least {n_least}, since the run in "
            f"'{checkpoint.run_dir}' has been trained on {checkpoint.n_samples} samples; raise it, "
            "or start a new run without resume"
        )


@contextmanager
def explained_misfit(checkpoint: Checkpoint) -> Iterator[None]:
    """A context in which a state that does not fit its run is a message that names its files.

    Raises:
        UserError: In place of what the parts of the run say.
    """
    try:
        yield
    except UserError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"resume: the state after {checkpoint.n_samples} samples in '{checkpoint.run_dir}' was "
            f"not written by this version of the script ({type(error).__name__}: "
            f"{one_line(error)[:300]}); use the version that wrote it, or start a new run"
        ) from error


def _check_has_no_links(run_dir: Path) -> None:
    """See that what is written to files of a run folder, which others may have made, stays there.

    Files that a number names are only read and replaced, so they may lie elsewhere, and wandb makes
    links of its own.
    """
    for path in run_dir.rglob("*"):
        is_allowed = NUMBERED_NAME.fullmatch(path.name) or run_dir / "wandb" in path.parents
        if path.is_symlink() and not is_allowed:
            raise UserError(
                f"resume: '{path}' is a link, through which the run would write outside its "
                "folder; put the file itself in its place"
            )


def clear_what_came_after(checkpoint: Checkpoint, metrics_path: Path) -> None:
    """Put aside what the run will do again, as `abandoned_*`, and cut off metrics logged since."""
    run_dir, n_samples = checkpoint.run_dir, checkpoint.n_samples
    n_bytes = checkpoint.state.get("metrics_bytes")
    if not isinstance(n_bytes, int) or n_bytes < 0:
        raise UserError(
            f"resume: the state after {n_samples} samples in '{run_dir}' does not say how long "
            f"{metrics_path.name} was ({n_bytes!r}); start a new run"
        )
    for name in (MANIFEST_NAME, STATE_NAME, WEIGHTS_NAME):
        for path, number in numbered_files(run_dir, name).items():
            if number > n_samples:
                path.replace(path.with_name(f"abandoned_{path.name}"))
    (run_dir / RESULT_FILE).unlink(missing_ok=True)
    for temporary in run_dir.glob(TEMPORARY_FILES):
        temporary.unlink()
    with metrics_path.open("a+b") as file:
        if file.tell() < n_bytes:
            say(f"warning: {metrics_path}: lines of it are missing")
        else:
            file.truncate(n_bytes)


def resume_line(run_dir: Path) -> str:
    """Return the command that resumes a run, as the script was called."""
    program = sys.argv[:1] if sys.argv[0].endswith(".py") else sys.argv[:2]
    interpreter = [sys.executable] if sys.argv[0].endswith(".py") else []
    command = [*interpreter, *program, str(run_dir / CONFIG_FILE), "--resume", str(run_dir)]
    return f"resume with: {shlex.join(command)}"


def _is_of_kind(run_dir: Path, config_class: type[TrainingConfig]) -> bool:
    path = run_dir / CONFIG_FILE
    try:
        validate_config(config_class, read_yaml(path), str(path))
    except UserError:
        return False
    return True
