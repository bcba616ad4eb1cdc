"""Checkpoints: weights in safetensors, and the state that lets a run go on.

No function here executes pickled code.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.base_config import UserError
from sparsify.training.run_folder import replace_atomically

STATE_NAME = re.compile(r"state_(\d+)\.pt")
WEIGHTS_NAME = re.compile(r"samples_(\d+)\.(safetensors|pt)")


def weights_path(run_dir: Path, n_samples: int) -> Path:
    """Where the weights after `n_samples` samples are written."""
    return run_dir / f"samples_{n_samples}.safetensors"


def save_weights(
    run_dir: Path,
    tensors: Mapping[str, Tensor],
    n_samples: int,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `samples_{n_samples}.safetensors` atomically and return its path.

    Args:
        run_dir: Folder of the run.
        tensors: A state dict. No two entries may share memory.
        n_samples: Samples trained on so far.
        metadata: What the weights belong to, kept in the file's header. None: no metadata.
    """
    path = weights_path(run_dir, n_samples)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replace_atomically(path) as temporary:
        save_file(on_cpu, temporary, metadata=dict(metadata) if metadata else None)
    return path


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or `.pt` file, on the CPU.

    Raises:
        UserError: There is no such file, it is damaged, or it holds anything but named tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; check the path")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None
    if path.suffix != ".pt":
        raise UserError(f"{path}: weights are read from .safetensors and .pt files")
    content = _load_plain(path)
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise UserError(
            f"{path}: holds more than named tensors; save a state dict and nothing else"
        )
    return dict(content)


def load_metadata(path: Path) -> dict[str, str]:
    """What `save_weights` was told about the weights. Empty for a `.pt` file.

    Raises:
        UserError: The file cannot be read.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def checkpoint_at(path: Path) -> Path:
    """The newest checkpoint of the run folder that `path` is, else `path` itself."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder; check the path")
    return latest_checkpoint(path) if path.is_dir() else path


def latest_checkpoint(run_dir: Path) -> Path:
    """The `samples_{N}` file of a run with the largest N, `.safetensors` before `.pt`.

    Raises:
        UserError: There is none.
    """
    found = numbered_files(run_dir, WEIGHTS_NAME)
    if not found:
        raise UserError(
            f"{run_dir}: holds no samples_{{N}}.safetensors or samples_{{N}}.pt; "
            "give the folder of a run that has saved a checkpoint"
        )
    return max(found, key=lambda path: (found[path], path.suffix == ".safetensors"))


def state_path(run_dir: Path, n_samples: int) -> Path:
    """Where the training state after `n_samples` samples is written."""
    return run_dir / f"state_{n_samples}.pt"


def save_state(run_dir: Path, n_samples: int, state: Mapping[str, Any]) -> Path:
    """Write what a run needs to go on, besides weights, atomically, and return the path.

    Args:
        run_dir: Folder of the run.
        n_samples: Samples trained on so far.
        state: Tensors, numbers and strings in dictionaries, lists and tuples (`Any`: the states
            of optimizers and loaders have no common type).

    Raises:
        TypeError: `state` holds an object that could not be loaded again without pickled code.
    """
    path = state_path(run_dir, n_samples)
    with replace_atomically(path) as temporary:
        torch.save(dict(state), temporary)
        try:
            _load_plain(temporary, is_mapped=True)
        except UserError as error:
            raise TypeError(f"the training state could not be loaded again: {error}") from None
    return path


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        UserError: There is no such file, or it is damaged.
    """
    return _load_plain(path)


def numbered_files(folder: Path, name: re.Pattern[str]) -> dict[Path, int]:
    """The files of `folder` whose whole name matches, with the first group of the match."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; check the path")
    matches = {path: name.fullmatch(path.name) for path in sorted(folder.iterdir())}
    return {path: int(match[1]) for path, match in matches.items() if match}


def _load_plain(path: Path, *, is_mapped: bool = False) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=is_mapped)
    except Exception as error:  # noqa: BLE001  A damaged pickle can make the reader raise anything.
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return UserError(
            f"{path}: needs the pickled code '{refused[1]}', which is never executed; "
            "save its tensors alone (torch.save of a state dict, or safetensors)"
        )
    reason = str(error).partition("\n")[0] if not isinstance(error, pickle.UnpicklingError) else ""
    return UserError(
        f"{path}: is damaged or no weights file ({reason or type(error).__name__}); "
        "use another copy"
    )
