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
from sparsify.runs.metrics_file import cut_metrics
from sparsify.runs.plots import PLOT_FILE
from sparsify.runs.run_folder import (
    CONFIG_FILE,
    EVALUATION_FILE,
    LOCK_FILE,
    METRICS_FILE,
    RESULT_FILE,
)
from sparsify.runs.weight_files import STATE_NAME, WEIGHTS_NAME, numbered_files, state_path
from sparsify.settings.base_config import BaseConfig, UserError, read_yaml, validate_config
from sparsify.settings.command_line import Settings, merged
from sparsify.settings.differences import differing_settings
from sparsify.settings.paths import UserPath
from sparsify.settings.secrets import one_line
from sparsify.training.config import NEWEST_RUN, TrainingConfig
from sparsify.training.state_check import MisfitError, is_count

TEMPORARY_FILES = ".*.tmp"
FILES = {CONFIG_FILE, METRICS_FILE, RESULT_FILE, EVALUATION_FILE, LOCK_FILE, PLOT_FILE}
"""Files that a run writes, except those that a number names."""


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
    folder = _folder_of(find_run(config.resume, config.save_dir, type(config)))
    if os.path.isdir(folder):  # which is else reported where it is read
        _check_has_no_links(folder)
    return folder


class _Wanted(BaseConfig):
    """What says which run is resumed."""

    resume: UserPath
    save_dir: UserPath | None


def settings_to_resume_with(
    config_class: type[TrainingConfig], path: Path | None, content: Settings, options: Settings
) -> tuple[Settings, Path]:
    """Return the settings of the run that a command line resumes, and the file that they are in.

    They are its own, which only options change. Of a file that is named beside them, it is said
    what differs, except what options change anyway.

    Args:
        config_class: Class of the settings.
        path: The file that is named. None: there is none.
        content: Settings in it.
        options: Settings as options.

    Raises:
        UserError: There is no such run, or its settings are not valid with the options.
    """
    asked = {"save_dir": config_class.model_fields["save_dir"].default, **content, **options}
    wanted = {name: asked[name] for name in _Wanted.model_fields}
    found = validate_config(_Wanted, wanted, str(path or "the command line"))
    resume = find_run(found.resume, found.save_dir, config_class)
    own = _folder_of(resume) / CONFIG_FILE
    if not os.path.isdir(own.parent):
        raise UserError(f"resume: there is no folder '{resume}'; give the folder of a run")
    saved = _saved_config(own.parent, config_class)
    settings = merged(read_yaml(own), options) | {"resume": str(resume)}
    validate_config(config_class, settings, f"'{own}' with the options of the command line")
    if path is not None:
        _say_what_is_not_used(config_class, path, content, saved, options)
    return settings, own


def _say_what_is_not_used(
    config_class: type[TrainingConfig],
    path: Path,
    content: Settings,
    saved: TrainingConfig,
    options: Settings,
) -> None:
    reason = f"{path} is not used, since a run is resumed with its own settings"
    try:
        differences = _differences(validate_config(config_class, content, str(path)), saved)
    except UserError:  # it needs options, or is another script's
        say(reason)
        return
    for name in ("save_dir", *options):
        differences.pop(name, None)
    if differences:
        changes = ", ".join(differences.values())
        say(f"{reason}: {changes}; to change one, give it as an option")


def _folder_of(path: Path) -> Path:
    """Return the run folder that `path` is, or is a file of a checkpoint in."""
    return path.parent if NUMBERED_NAME.fullmatch(path.name) else path


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
    kept = set(kept_settings)
    changes = changed_settings(config, checkpoint.run_dir)
    if refused := [change for name, change in changes.items() if name.split(".")[0] in kept]:
        raise UserError(
            f"resume: a run is resumed with the settings in {checkpoint.run_dir / CONFIG_FILE}, "
            f"but given are {', '.join(refused)}; remove the change, or start a new run without "
            "resume"
        )
    if config.n_batches * config.batch_size < checkpoint.n_samples:
        n_least = -(-checkpoint.n_samples // config.samples_per_step) * config.samples_per_step
        raise UserError(
            f"n_samples ({config.n_samples}) must be at least {n_least}, since the run in "
            f"'{checkpoint.run_dir}' has been trained on {checkpoint.n_samples} samples; raise it, "
            "or start a new run without resume"
        )


def changed_settings(config: TrainingConfig, run_dir: Path) -> dict[str, str]:
    """Return what `config` changes in the settings of a run, by the name of the setting.

    Raises:
        UserError: It is not a run of the same script.
    """
    return _differences(_saved_config(run_dir, type(config)), config)


def describe_resumption(config: TrainingConfig, checkpoint: Checkpoint) -> str:
    """Return which run is resumed, where, and what is changed in its settings, in a line."""
    changes = ", ".join(changed_settings(config, checkpoint.run_dir).values())
    where = f"{checkpoint.run_dir}: resumes after {checkpoint.n_samples:,} samples"
    return f"{where}, with {changes}" if changes else where


def _saved_config(run_dir: Path, config_class: type[TrainingConfig]) -> TrainingConfig:
    path = run_dir / CONFIG_FILE
    try:
        return validate_config(config_class, read_yaml(path), str(path))
    except UserError as error:
        raise UserError(
            f"resume: '{run_dir}' is not a run of this script, or its config is damaged;"
            f" give another run\n{error}"
        ) from None


def _differences(before: TrainingConfig, now: TrainingConfig) -> dict[str, str]:
    """Return what differs by the name of a setting, except which run is resumed."""
    a, b = (config.with_absolute_paths().model_dump(mode="json") for config in (before, now))
    found = {line.partition(":")[0]: line for line in differing_settings("", a, b)}
    return {name: line for name, line in found.items() if name != "resume"}


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
    except MisfitError as error:
        path = state_path(checkpoint.run_dir, checkpoint.n_samples)
        raise UserError(
            f"{path}: does not fit this run: {error}; use the version of the script and the "
            "settings that wrote it, another checkpoint, or start a new run"
        ) from error
    except (
        *(ArithmeticError, AssertionError, AttributeError),
        *(LookupError, RuntimeError, TypeError, ValueError),
    ) as error:
        raise UserError(
            f"resume: the state after {checkpoint.n_samples} samples in '{checkpoint.run_dir}' was "
            f"not written by this version of the script ({type(error).__name__}: "
            f"{one_line(error)[:300]}); use the version that wrote it, or start a new run"
        ) from error


def _check_has_no_links(run_dir: Path) -> None:
    """See that a run folder, which others may have made, holds files and folders alone.

    Through a link the run would write elsewhere, and a pipe would keep it waiting. Files that a
    number names are only read and replaced, so they may lie elsewhere, and wandb makes links of its
    own.
    """
    for path in run_dir.rglob("*"):
        is_number = NUMBERED_NAME.fullmatch(path.name)
        if is_number or run_dir / "wandb" in path.parents:
            continue
        if path.is_symlink():
            raise UserError(
                f"resume: '{path}' is a link, through which the run would write outside its "
                "folder; put the file itself in its place"
            )
        if path.is_dir() and (path.name in FILES or path.match(TEMPORARY_FILES)):
            raise UserError(f"resume: '{path}' is a folder, not a file; move it away")
        if not path.is_dir() and not path.is_file():
            raise UserError(f"resume: '{path}' is a pipe or a device; move it away")


def clear_what_came_after(checkpoint: Checkpoint, metrics_path: Path) -> None:
    """Put aside what the run will do again, as `abandoned_*`, and cut off metrics logged since.

    Raises:
        UserError: A file cannot be moved, or the metrics are not readable.
    """
    run_dir, n_samples = checkpoint.run_dir, checkpoint.n_samples
    n_bytes = checkpoint.state.get("metrics_bytes")
    if not isinstance(n_bytes, int) or not is_count(n_bytes):
        raise UserError(
            f"resume: the state after {n_samples} samples in '{run_dir}' does not say how long "
            f"{metrics_path.name} was ({n_bytes!r}); start a new run"
        )
    try:
        for name in (MANIFEST_NAME, STATE_NAME, WEIGHTS_NAME):
            for path, number in numbered_files(run_dir, name).items():
                if number > n_samples:
                    path.replace(path.with_name(f"abandoned_{path.name}"))
        (run_dir / RESULT_FILE).unlink(missing_ok=True)
        for temporary in run_dir.glob(TEMPORARY_FILES):
            temporary.unlink()
        cut_metrics(metrics_path, n_bytes)
    except OSError as error:
        raise UserError(
            f"resume: '{error.filename}' cannot be put aside or read ({error.strerror}); move it "
            "away"
        ) from None


def resume_line(run_dir: Path) -> str:
    """Return the command that resumes a run, as the script was called."""
    program = sys.argv[:1] if sys.argv[0].endswith(".py") else sys.argv[:2]
    interpreter = [sys.executable] if sys.argv[0].endswith(".py") else []
    command = [*interpreter, *program, "--resume", str(run_dir)]
    return f"resume with: {shlex.join(command)}"


def _is_of_kind(run_dir: Path, config_class: type[TrainingConfig]) -> bool:
    path = run_dir / CONFIG_FILE
    try:
        validate_config(config_class, read_yaml(path), str(path))
    except UserError:
        return False
    return True
