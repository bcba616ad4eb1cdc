"""Tensors and settings of foreign files, none of which can execute anything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsify.runs.run_folder import write_text
from sparsify.runs.weight_files import load_plain, load_weights
from sparsify.settings.base_config import UserError
from sparsify.settings.files import open_regular, read_text

TENSOR_SUFFIXES = (".safetensors", ".pt", ".npz")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, in float32 if they are numbers with a point.

    Raises:
        UserError: It cannot be read, or holds anything else.
    """
    return as_float32(_read_npz(path) if path.suffix == ".npz" else load_weights(path))


def read_state(path: Path) -> dict[str, Any]:
    """Return what a `.pt` file holds, tensors and plain data, by name.

    Raises:
        UserError: It cannot be read, or holds no dictionary.
    """
    content = load_plain(path)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path}: holds {type(content).__name__}, not weights by name")
    return content


def as_float32(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a mapping, those with a point in float32."""
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }


def read_json(path: Path) -> dict[str, Any]:
    """Return the settings of a JSON file.

    Raises:
        UserError: It cannot be read, or holds no settings.
    """
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError):  # no UTF-8, or no JSON
        raise UserError(f"{path}: is not JSON; use another copy") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not settings by name")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write the settings of a JSON file, which is there completely or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def needed(tensors: Mapping[str, Tensor], path: Path, *names: str) -> list[Tensor]:
    """Return tensors by name.

    Raises:
        UserError: One is missing.
    """
    if missing := [name for name in names if name not in tensors]:
        raise UserError(
            f"{path}: has no '{missing[0]}', but {', '.join(map(repr, tensors))}; use another copy"
        )
    return [tensors[name] for name in names]


def whole_number(settings: Mapping[str, Any], name: str, path: Path) -> int:
    """Return a setting that must be a whole number above 0.

    Raises:
        UserError: It is missing, or something else.
    """
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {name} is {value!r}, not a whole number above 0; correct it")
    return value


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays}
    except (OSError, ValueError, TypeError, EOFError, KeyError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(
            f"{path}: is damaged, or holds more than arrays of numbers ({reason}); use another copy"
        ) from None
