"""Checks that a saved state is one that a run could have written, before anything computes with it.

A state from elsewhere may hold anything, and kernels trust their tensors: one of another shape, or
with strides that overlap, makes them read and write memory that is not theirs.
"""

import math
from typing import Any

import torch
from torch import Tensor

MAX_INT = 2**63
"""Numbers below are what torch and NumPy can count."""


class MisfitError(ValueError):
    """A part of a saved state from which a run cannot be resumed."""


def check_like(found: Any, like: Any, entry: str) -> None:  # states are of many types
    """See that a part of a state has the form of another, finite numbers, and no negative counts.

    Args:
        found: A part of a state that was loaded, on the CPU.
        like: The same part of the state of a new run: the same keys, types, shapes. Where it is
            None, anything is accepted; where it is NaN, a number may be; where it is an empty
            list, any list, into which its reader must look.
        entry: Name of the part.

    Raises:
        MisfitError: It is not.
    """
    if isinstance(like, Tensor):
        check_tensor(found, like, entry)
    elif isinstance(like, dict):
        require(isinstance(found, dict), found, "a dict", entry)
        for key, part in like.items():
            if key not in found:
                raise MisfitError(f"{entry}.{key} is missing")
            check_like(found[key], part, f"{entry}.{key}")
    elif isinstance(like, list | tuple):
        is_open = like == []
        expected = "a list" if is_open else f"a {type(like).__name__} of {len(like)}"
        is_alike = type(found) is type(like) and (is_open or len(found) == len(like))
        require(is_alike, found, expected, entry)
        for index, part in enumerate(like):
            check_like(found[index], part, f"{entry}.{index}")
    elif isinstance(like, str | bool):
        require(type(found) is type(like), found, f"a {type(like).__name__}", entry)
        require(found == like or isinstance(like, bool), found, repr(like), entry)
    elif isinstance(like, int):
        require(is_count(found), found, "a number that counts", entry)
    elif isinstance(like, float):
        require(type(found) is float and math.isfinite(found), found, "a finite number", entry)


def check_tensor(found: object, like: Tensor, entry: str) -> Tensor:
    """Return what was found, if it is a plain tensor with the shape and type of `like`.

    Raises:
        MisfitError: It is not, or holds numbers that are not finite, or negative integers.
    """
    is_plain = (
        type(found) is Tensor
        and found.layout is torch.strided
        and found.device.type == "cpu"
        and not found.requires_grad
        and (found.dtype, found.shape) == (like.dtype, like.shape)
    )
    require(is_plain, found, describe(like), entry)
    assert isinstance(found, Tensor)
    if like.is_floating_point():
        is_valid = found.isfinite() | (found.isnan() & like.isnan().to(found.device))
        require(bool(is_valid.all()), found, "one of finite numbers", entry)
    elif like.dtype is not torch.bool:
        require(bool((found >= 0).all()), found, "one without negative numbers", entry)
    return found


def is_count(value: object) -> bool:
    """Return whether something counts: an int, not negative, that tensors could hold."""
    return type(value) is int and 0 <= value < MAX_INT


def require(is_met: bool, found: object, expected: str, entry: str) -> None:
    """Raise a `MisfitError` that says what was found and expected, unless a condition is met."""
    if not is_met:
        raise MisfitError(f"{entry} is {describe(found)}, but {expected} was expected")


def describe(value: object) -> str:
    """Return what something is, in a few words."""
    if isinstance(value, Tensor):
        form = f"{value.layout}, {value.dtype}, shape {list(value.shape)}"
        return f"a tensor ({form.replace('torch.', '')})"
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    # Python refuses to write very long numbers.
    is_shown = value is None or type(value) in (bool, float) or is_count(value)
    return repr(value) if is_shown else f"of type {type(value).__name__}"
