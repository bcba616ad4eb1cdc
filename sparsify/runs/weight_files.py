"""Files of a checkpoint: weights in safetensors, and the state with which a run is resumed.

No function here executes pickled code.
"""

import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.runs.run_folder import check_regular, replace_atomically
from sparsify.settings.base_config import UserError
from sparsify.settings.files import open_regular
from sparsify.training.memory import free_memory

STATE_NAME = re.compile(r"state_(\d+)\.pt")
WEIGHTS_NAME = re.compile(r"samples_(\d+)\.(safetensors|pt)")
ZIP_START = b"PK\3\4"
N_LEGACY_PICKLES = 5
"""In a file that torch.save wrote before it wrote zips: magic number, version, system, content,
keys of the tensors."""
MAX_PICKLED_TEXT = 5_000
"""Names and paths are shorter."""


def weights_path(run_dir: Path, n_samples: int) -> Path:
    """Path of the weights after `n_samples` samples."""
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

    Raises:
        OSError: The file cannot be written.
    """
    path = weights_path(run_dir, n_samples)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replace_atomically(path) as temporary:
        try:
            save_file(on_cpu, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
            raise
    return path


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` or `.pt` file, on the CPU.

    Raises:
        UserError: There is no such file, it is damaged, or it holds anything but named tensors.
    """
    _check_is_file(path, free_memory("cpu"))
    if path.suffix == ".safetensors":
        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None
        return _checked(path, weights)
    if path.suffix != ".pt":
        raise UserError(f"{path}: weights are read from .safetensors and .pt files")
    return _checked(path, load_plain(path))


def _check_is_file(path: Path, max_bytes: int | None = None) -> None:
    if not os.path.lexists(path):
        raise UserError(f"{path}: there is no such file; check the path")
    check_regular(path, max_bytes)


def _checked(path: Path, content: object) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise UserError(
            f"{path}: holds more than named tensors; save a state dict and nothing else"
        )
    for name, tensor in content.items():
        is_plain = tensor.layout is torch.strided and not tensor.is_quantized
        if not is_plain or tensor.is_complex() or tensor.device.type != "cpu":
            raise UserError(
                f"{path}: '{name}' is not a dense tensor of real numbers (it is {tensor.dtype}, "
                f"{tensor.layout}, on {tensor.device}); save one"
            )
    return dict(content)


def load_metadata(path: Path) -> dict[str, str]:
    """Return the metadata that `save_weights` was given. Empty for a `.pt` file.

    Raises:
        UserError: The file cannot be read.
    """
    if path.suffix != ".safetensors":
        return {}
    _check_is_file(path)  # to open a pipe would wait for ever
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def check_identity(path: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise a `UserError` if the SAEs in the file at `path` belong to another model."""
    for key, value in wanted.items():
        # Checkpoints of the original system record nothing.
        if found.get(key, value) != value and key == "sae_kind":
            raise UserError(
                f"{path}: its SAEs are of kind '{found[key]}', but saes.kind is '{value}'; set it "
                f"to '{found[key]}', or use other SAEs"
            )
        if found.get(key, value) != value:
            raise UserError(
                f"{path}: its SAEs were trained with {key} '{found[key]}', not '{value}'; use the "
                "model that they belong to"
            )


def checkpoint_at(path: Path) -> Path:
    """Return the newest checkpoint of the run folder that `path` is, else `path` itself."""
    if not os.path.exists(path):  # False where `Path.exists` would raise
        raise UserError(f"{path}: there is no such file or folder; check the path")
    return latest_checkpoint(path) if path.is_dir() else path


def latest_checkpoint(run_dir: Path) -> Path:
    """Return the `samples_{N}` file with the largest N of a run, `.safetensors` before `.pt`.

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
    """Path of the training state after `n_samples` samples."""
    return run_dir / f"state_{n_samples}.pt"


def save_state(run_dir: Path, n_samples: int, state: Mapping[str, Any]) -> Path:
    """Write the state with which a run is resumed, atomically, and return its path.

    Args:
        run_dir: Folder of the run.
        n_samples: Samples trained on so far.
        state: Tensors, numbers and strings in dictionaries, lists and tuples (`Any`: the states
            of optimizers and loaders have no common type).

    Raises:
        TypeError: `state` holds an object that could not be loaded again without pickled code.
        OSError: The file cannot be written.
    """
    path = state_path(run_dir, n_samples)
    with replace_atomically(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(dict(state), file)
        except RuntimeError as error:
            # When a write fails, torch fails again at the next thing it does.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        try:
            load_plain(temporary, is_mapped=True)
        except UserError as error:
            raise TypeError(f"the training state could not be loaded again: {error}") from None
    return path


def load_state(path: Path) -> dict[str, Any]:
    """Return the state that `save_state` wrote.

    Raises:
        UserError: There is no such file, or it is damaged.
    """
    state = load_plain(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds {type(state).__name__}, not a training state")
    return state


def numbered_files(folder: Path, name: re.Pattern[str]) -> dict[Path, int]:
    """Return the files of `folder` whose whole name matches, with the first group of the match."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: there is no such folder; check the path")
    matches = {path: name.fullmatch(path.name) for path in sorted(folder.iterdir())}
    return {path: int(match[1]) for path, match in matches.items() if match}


def load_plain(path: Path, *, is_mapped: bool = False) -> Any:  # what torch.save takes
    """Return the tensors and plain data of a file made by torch.save, on the CPU.

    Raises:
        UserError: There is no such file, it is damaged, or it holds other code's objects.
    """
    try:
        _check_costs_what_it_holds(path)
        return torch.load(path, weights_only=True, map_location="cpu", mmap=is_mapped)
    except Exception as error:  # noqa: BLE001  A damaged pickle can make the reader raise anything.
        raise _unreadable(path, error) from None


def _check_costs_what_it_holds(path: Path) -> None:
    """See that a file made by torch.save takes about as much to load as there is in it.

    torch.load would inflate what is compressed, to a thousand times the size of the file, make
    bytes of any number that a pickle asks for, and search its own message about a text of a pickle
    in a time that grows with the square of its length.
    """
    with open_regular(path) as file:
        if file.read(4) != ZIP_START:
            file.seek(0)
            for _ in range(N_LEGACY_PICKLES):
                _check_pickle(file)
            return
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("it is compressed, which torch.save never does")
                if member.filename.endswith(".pkl"):
                    with archive.open(member) as pickled:
                        _check_pickle(pickled)


def _check_pickle(file: IO[bytes]) -> None:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise ValueError("it makes a bytearray, which is not a tensor")
        if isinstance(argument, str | bytes) and len(argument) > MAX_PICKLED_TEXT:
            raise ValueError(f"it has a text of more than {MAX_PICKLED_TEXT:,} characters")


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
