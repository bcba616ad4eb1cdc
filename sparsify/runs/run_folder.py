"""The folder of one run, and files that are there completely or not at all."""

import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from sparsify.settings.base_config import BaseConfig, UserError, dump_yaml
from sparsify.settings.files import open_regular, read_text
from sparsify.training.config import check_run_name

CONFIG_FILE = "final_config.yaml"
METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "eval.json"
EVALUATION_FILE = "evaluation.json"
LOCK_FILE = ".lock"


def check_save_dir(save_dir: Path) -> None:
    """See that `save_dir` can be made and written to, and leave nothing behind.

    Raises:
        UserError: It cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=existing_parent(save_dir)):
            pass
    except OSError as error:
        raise _cannot_write(save_dir, error) from None


def existing_parent(path: Path) -> Path:
    """`path`, or the first of its parents that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def create_run_folder(save_dir: Path, run_name: str) -> Path:
    """Make `{save_dir}/{run_name}_{date}_{time}`, a folder that was not there before.

    Raises:
        UserError: `run_name` is not the name of a folder, or `save_dir` cannot be written.
    """
    check_run_name(run_name)
    check_save_dir(save_dir)
    base = f"{run_name}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    n_taken = 0
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(save_dir, error) from None
    while True:
        # Two runs may start in the same second.
        folder = save_dir / (f"{base}_{n_taken}" if n_taken else base)
        try:
            folder.mkdir()
        except FileExistsError:
            n_taken += 1
        except OSError as error:
            raise _cannot_write(save_dir, error) from None
        else:
            return folder


@contextmanager
def held_run_folder(run_dir: Path | None) -> Iterator[None]:
    """Keep other processes from training in `run_dir` until the block ends, or the process.

    Does nothing where there is no folder, which others report, and on Windows.

    Raises:
        UserError: Another process holds it.
    """
    if run_dir is None or not os.path.isdir(run_dir) or os.name == "nt":
        yield
        return
    import fcntl

    try:
        # What stands there may be a pipe, or a link to a file elsewhere, which is left as it is.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.fdopen(os.open(run_dir / LOCK_FILE, flags, 0o666), "rb+", buffering=0)
    except OSError as error:
        raise _cannot_write(run_dir, error) from None
    with file:
        try:
            # Of the process: a child that outlives a killed one does not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which one depends on the system
            raise UserError(
                f"resume: another process trains in '{run_dir}'; wait until it ends, or stop it"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def _cannot_write(save_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"save_dir: cannot write to '{save_dir}' ({error.strerror}); "
        "choose a folder that you may write to, or null to keep no files"
    )


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once the block ends without an error.

    Whatever happens, `path` holds its old content or the whole of the new one. If `path` is a link
    to a file elsewhere, that one does not change.
    """
    # A name that nobody can have foreseen, to put a link there.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors leaves its files to their owner alone
        _flush_to_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # which an error of writing does not say
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _flush_to_disk(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replace_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_result(run_dir: Path, result: Mapping[str, Any]) -> Path:
    """Write `eval.json`, by which a run is known to be finished.

    Args:
        run_dir: Folder of the run.
        result: Numbers and texts in dictionaries and lists; `metrics` by their names in the log.
    """
    path = run_dir / RESULT_FILE
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path


def read_result(run_dir: Path) -> dict[str, Any]:
    """Return what `write_result` wrote.

    Raises:
        UserError: There is no `eval.json`, or it is damaged.
    """
    path = run_dir / RESULT_FILE
    try:
        result = json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is damaged; evaluate the run again") from None
    metrics = result.get("metrics") if isinstance(result, dict) else None
    if not isinstance(metrics, dict) or not all(map(_is_measured, metrics.values())):
        raise UserError(f"{path}: is damaged, it holds no metrics; evaluate the run again")
    return result


def _is_measured(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def check_regular(path: Path, max_bytes: int | None = None) -> None:
    """See that what a library is about to open is a file; for arguments see `open_regular`.

    Raises:
        UserError: It is not, or it is too large.
    """
    try:
        open_regular(path, max_bytes).close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def write_config(run_dir: Path, config: BaseConfig) -> Path:
    """Write `final_config.yaml`, from which the run can be repeated and its result loaded."""
    path = run_dir / CONFIG_FILE
    write_text(path, dump_yaml(config.with_absolute_paths()))
    return path


def _flush_to_disk(path: Path) -> None:
    # Windows cannot open folders, and renames there need no flush of the folder.
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
