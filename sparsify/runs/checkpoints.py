"""Checkpoints, from which a run is resumed as if it had not stopped.

A checkpoint after N samples is three files. `samples_{N}.safetensors` holds the weights,
`state_{N}.pt` all else that the next steps depend on, and `checkpoint_{N}.json`, which is written
last, the checksums of both. Where that is missing or does not fit, the checkpoint before counts.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.runs.run_folder import write_text
from sparsify.runs.weight_files import (
    STATE_NAME,
    load_metadata,
    load_state,
    load_weights,
    numbered_files,
    save_state,
    save_weights,
    state_path,
    weights_path,
)
from sparsify.settings.base_config import UserError
from sparsify.settings.files import open_regular, read_text
from sparsify.training.memory import free_memory

MANIFEST_NAME = re.compile(r"checkpoint_(\d+)\.json")
NUMBERED_NAME = re.compile(r"(?:checkpoint|samples|state)_(\d+)\.(?:json|safetensors|pt)")

STATE_TO_WEIGHTS = 8
LEAST_MAX_STATE = 64_000_000
"""Bytes of a state are at most that many times those of the weights, and these: two moments and a
gradient of each weight, counts of each element, generators."""
NO_FILE_OF_A_RUN = (errno.EINVAL, errno.EFBIG, errno.EISDIR)
"""Errors of `open_regular` about something else than a file, or one too large to be a run's."""


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after a number of samples."""

    run_dir: Path
    n_samples: int
    weights: dict[str, Tensor]
    state: dict[str, Any]  # of optimizers, loader and generators, which have no common type
    damaged: list[str]
    """Messages about newer checkpoints that cannot be used."""


def save_checkpoint(
    run_dir: Path,
    n_samples: int,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep_last: int,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the files of a checkpoint, and return the path of its weights.

    Checkpoints beyond the last `keep_last` lose their state. Their weights stay.

    Args:
        run_dir: Folder of the run.
        n_samples: Samples trained on so far.
        weights: A state dict. No two entries may share memory.
        state: Tensors, numbers and strings in dictionaries, lists and tuples.
        keep_last: How many checkpoints keep their state.
        metadata: What the weights belong to, kept in their file's header. None: no metadata.

    Raises:
        OSError: A file cannot be written.
        TypeError: `state` holds an object that could not be loaded again without pickled code.
    """
    weights_file = save_weights(run_dir, weights, n_samples, metadata)
    files = (weights_file, save_state(run_dir, n_samples, state))
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
    return weights_file


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the newest whole checkpoint of a run folder, or that which a file in it belongs to.

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
        except OSError as error:  # which may pass, so the checkpoint is not given up
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
            f"last ones; resume from one of {', '.join(map(str, numbers))} samples"
        )
    raise UserError(
        f"resume: '{path}' holds no whole checkpoint to resume from; start a new run{reasons}"
    )


def _check_files(run_dir: Path, number: int) -> None:
    path = _manifest_path(run_dir, number)
    try:
        expected = json.loads(read_text(path))["sha256"]
        files = (weights_path(run_dir, number), state_path(run_dir, number))
        n_weights = _check_size(files[0], free_memory("cpu"))
        load_metadata(files[0])  # which tells a file of the right beginning, before all is read
        _check_size(files[1], STATE_TO_WEIGHTS * n_weights + LEAST_MAX_STATE)
        damaged = [file for file in files if _checksum(file) != expected[file.name]]
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is missing") from None
    except OSError as error:
        if error.errno in NO_FILE_OF_A_RUN:
            raise UserError(f"{error.filename}: is damaged ({error.strerror})") from None
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: is damaged") from None
    if damaged:
        raise UserError(f"{damaged[0]}: is damaged, its checksum is not that in {path.name}")


def _check_size(path: Path, max_bytes: int) -> int:
    with open_regular(path, max_bytes) as file:
        return os.fstat(file.fileno()).st_size


def _checksum(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_path(run_dir: Path, n_samples: int) -> Path:
    return run_dir / f"checkpoint_{n_samples}.json"
