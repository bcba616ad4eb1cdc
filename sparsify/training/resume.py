"""Points from which a run goes on as if it had not stopped.

Such a point after N samples is three files. `samples_{N}.safetensors` holds the weights,
`state_{N}.pt` all else that the next steps depend on, and `checkpoint_{N}.json`, which is written
last, the checksums of both. Where that is missing or does not fit, the point before counts.
"""

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.base_config import UserError, read_yaml, validate_config
from sparsify.config_differences import differing_settings
from sparsify.secrets import one_line
from sparsify.training.checkpoints import (
    STATE_NAME,
    WEIGHTS_NAME,
    load_state,
    load_weights,
    numbered_files,
    save_state,
    state_path,
    weights_path,
)
from sparsify.training.config import NEWEST_RUN, TrainingConfig
from sparsify.training.run_folder import CONFIG_FILE, write_text

MANIFEST_NAME = re.compile(r"checkpoint_(\d+)\.json")
NUMBERED_NAME = re.compile(r"(?:checkpoint|samples|state)_(\d+)\.(?:json|safetensors|pt)")
TEMPORARY_FILES = ".*.tmp"


@dataclass(frozen=True)
class Checkpoint:
    """A point from which a run goes on."""

    run_dir: Path
    n_samples: int
    weights: dict[str, Tensor]
    state: dict[str, Any]  # of optimizers, loader and generators, which have no common type
    damaged: list[str]
    """Messages about newer points that cannot be used."""


def save_checkpoint(
    run_dir: Path, n_samples: int, state: Mapping[str, Any], keep_last: int
) -> None:
    """Make a point to go on from of the weights after `n_samples`, which have been written.

    Points beyond the last `keep_last` lose their state. Their weights stay.

    Args:
        run_dir: Folder of the run.
        n_samples: Samples trained on so far.
        state: Tensors, numbers and strings in dictionaries, lists and tuples.
        keep_last: How many points to keep.

    Raises:
        TypeError: `state` holds an object that could not be loaded again without pickled code.
    """
    files = (weights_path(run_dir, n_samples), save_state(run_dir, n_samples, state))
    content = {"n_samples": n_samples, "sha256": {file.name: _checksum(file) for file in files}}
    write_text(_manifest_path(run_dir, n_samples), json.dumps(content, indent=1) + "\n")
    kept = sorted(numbered_files(run_dir, MANIFEST_NAME).values())[-keep_last:]
    for manifest, number in numbered_files(run_dir, MANIFEST_NAME).items():
        if number not in kept:
            manifest.unlink()
    # Those without a manifest too, which a crash may have left.
    for state_file, number in numbered_files(run_dir, STATE_NAME).items():
        if number not in kept:
            state_file.unlink()


def checkpoint_to_go_on_from(config: TrainingConfig, kept_settings: Iterable[str]) -> Checkpoint:
    """What `config.resume` means. Newer points that cannot be used are warned about.

    Args:
        config: With what the run is to go on.
        kept_settings: Names of settings that the saved state holds or depends on: another value
            would not fit it or have no effect.

    Raises:
        UserError: There is none, or `config` does not suit it.
    """
    assert config.resume is not None
    checkpoint = load_checkpoint(find_run(config.resume, config.save_dir, type(config)))
    for message in checkpoint.damaged:
        print(f"warning: {message}; it is left out", file=sys.stderr)
    check_goes_on(config, checkpoint, kept_settings)
    return checkpoint


def folder_to_write_to(config: TrainingConfig) -> Path | None:
    """The folder of the run that goes on, or where a new one makes its own. None: no files.

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


def load_checkpoint(path: Path) -> Checkpoint:
    """The newest whole point of a run folder, or the one that a file in it belongs to.

    Raises:
        UserError: There is none.
    """
    run_dir, wanted = path, None
    if (match := NUMBERED_NAME.fullmatch(path.name)) and os.path.isfile(path):
        run_dir, wanted = path.parent, int(match[1])
    elif not os.path.isdir(path):  # False where `Path.is_dir` would raise
        raise UserError(f"resume: there is no folder '{path}'; give the folder of a run")
    numbers = sorted(numbered_files(run_dir, MANIFEST_NAME).values(), reverse=True)
    damaged: list[str] = []
    for number in numbers if wanted is None else [wanted]:
        try:
            _check_files(run_dir, number)
        except UserError as error:
            damaged.append(str(error))
        except OSError as error:  # which may pass, so the point is not given up
            raise UserError(
                f"{error.filename}: cannot be read ({error.strerror}); try again"
            ) from None
        else:
            # They are what was written. If they cannot be read, that may pass too.
            state = load_state(state_path(run_dir, number))
            weights = load_weights(weights_path(run_dir, number))
            return Checkpoint(run_dir, number, weights, state, damaged)
    reasons = "".join(f"\n  {message}" for message in damaged)
    if wanted is not None and numbers and wanted not in numbers:
        raise UserError(
            f"resume: '{path}' has no training state any more, since keep_last keeps that of the "
            f"last ones; go on from one of {', '.join(map(str, numbers))} samples"
        )
    raise UserError(
        f"resume: '{path}' holds no whole checkpoint to go on from; start a new run{reasons}"
    )


def find_run(resume: Path, save_dir: Path | None, config_class: type[TrainingConfig]) -> Path:
    """What `resume` means: itself, or the newest run in `save_dir` that has a checkpoint.

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
            f"resume: no run in save_dir '{save_dir}' has a checkpoint to go on from; start one "
            "without resume, or give the folder of a run"
        )
    return written[max(written)]


def check_goes_on(
    config: TrainingConfig, checkpoint: Checkpoint, kept_settings: Iterable[str]
) -> None:
    """See that `config` suits a run's checkpoint.

    Args:
        config: With what the run is to go on.
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
            f"resume: '{checkpoint.run_dir}' is no run of this script, or its config is damaged; "
            f"give another run\n{error}"
        ) from None
    now = config.model_dump(mode="json")
    changes = [
        c for name in kept_settings for c in differing_settings(name, before[name], now[name])
    ]
    if changes:
        raise UserError(
            f"resume: a run goes on with the settings in {path}, but given are "
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
    (run_dir / "eval.json").unlink(missing_ok=True)
    for temporary in run_dir.glob(TEMPORARY_FILES):
        temporary.unlink()
    with metrics_path.open("a+b") as file:
        if file.tell() < n_bytes:
            print(f"warning: {metrics_path}: lines of it are missing", file=sys.stderr)
        else:
            file.truncate(n_bytes)


def resume_line(run_dir: Path) -> str:
    """What to type to go on with a run, as the script was called."""
    program = sys.argv[:1] if sys.argv[0].endswith(".py") else sys.argv[:2]
    interpreter = [sys.executable] if sys.argv[0].endswith(".py") else []
    command = [*interpreter, *program, str(run_dir / CONFIG_FILE), "--resume", str(run_dir)]
    return f"go on with: {shlex.join(command)}"


def _is_of_kind(run_dir: Path, config_class: type[TrainingConfig]) -> bool:
    path = run_dir / CONFIG_FILE
    try:
        validate_config(config_class, read_yaml(path), str(path))
    except UserError:
        return False
    return True


def _check_files(run_dir: Path, number: int) -> None:
    path = _manifest_path(run_dir, number)
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        files = (weights_path(run_dir, number), state_path(run_dir, number))
        damaged = [file for file in files if _checksum(file) != expected[file.name]]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is missing") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: is damaged") from None
    if damaged:
        raise UserError(f"{damaged[0]}: is damaged, its checksum is not that in {path.name}")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_path(run_dir: Path, n_samples: int) -> Path:
    return run_dir / f"checkpoint_{n_samples}.json"
