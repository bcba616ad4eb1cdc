"""Interventions on what SAEs write: elements ablated, set or scaled, and steering.

`SAETransformer.forward`, its `generate` and `intervention_effect` take them. An `Edit` carries them
out in a pass; `edits.py` has the formula.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from sparsify.settings.base_config import UserError

Indices = int | Sequence[int] | Int[Tensor, "..."]
"""One index or several. One that is given twice counts once."""


@dataclass(frozen=True)
class Intervention:
    """A change of some elements on some tokens, made by `ablate`, `set_to`, `scale` or `steer`."""

    position: str
    """The hook point where the SAE writes."""

    elements: tuple[int, ...]
    """Dictionary elements, counted from 0."""

    kind: Literal["set", "scale", "steer"]

    amount: float
    """Value that entries of the code are set to, factor that scales them, or how far to steer."""

    tokens: tuple[int, ...] | None = None
    """Places in the sequence, counted from 0, or from its end if negative. None: all."""


def ablate(position: str, elements: Indices, tokens: Indices | None = None) -> Intervention:
    """Set elements to zero.

    Args:
        position: The hook point where the SAE writes.
        elements: Dictionary elements, counted from 0.
        tokens: Places in each sequence, counted from 0, or from its end if negative. None: all.

    Raises:
        UserError: An index is not a whole number, or there are none.
    """
    return set_to(position, elements, 0.0, tokens)


def set_to(
    position: str, elements: Indices, value: float, tokens: Indices | None = None
) -> Intervention:
    """Set elements to a value, in the unit of the code, whether they were active or not.

    Arguments and errors are those of `ablate`; the value must be finite.
    """
    return _intervention(position, elements, "set", value, tokens)


def scale(
    position: str, elements: Indices, factor: float, tokens: Indices | None = None
) -> Intervention:
    """Multiply elements by a factor; those that are not active stay so.

    Arguments and errors are those of `ablate`; the factor must be finite.
    """
    return _intervention(position, elements, "scale", factor, tokens)


def steer(
    position: str, elements: Indices, amount: float, tokens: Indices | None = None
) -> Intervention:
    """Add the elements' directions, whatever the code is, which stays as it was.

    Args:
        position: The hook point where the SAE writes.
        elements: Dictionary elements. Each adds its direction.
        amount: Length of what each adds, in the unit of the activation: directions have unit norm.
            Below zero it is subtracted. It must be finite.
        tokens: As for `ablate`.

    Raises:
        UserError: As for `ablate`.
    """
    return _intervention(position, elements, "steer", amount, tokens)


def _intervention(
    position: str,
    elements: Indices,
    kind: Literal["set", "scale", "steer"],
    amount: float,
    tokens: Indices | None,
) -> Intervention:
    if not math.isfinite(amount):
        raise UserError(f"interventions: {kind}: {amount} is not a finite number; give one")
    places = None if tokens is None else _as_indices(tokens, "tokens")
    return Intervention(position, _as_indices(elements, "elements"), kind, float(amount), places)


def _as_indices(given: Indices, setting: str) -> tuple[int, ...]:
    """One index or several as a tuple, each of them once.

    Raises:
        UserError: They are not whole numbers, or there are none.
    """
    try:
        indices = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):  # depends on what is given
        indices = None
    if indices is not None and indices.numel() == 0:
        raise UserError(f"interventions: {setting}: is empty; name at least one")
    if indices is None or indices.dtype == torch.bool or indices.is_floating_point():
        raise UserError(f"interventions: {setting}: {given!r} is not an index; give whole numbers")
    return tuple(dict.fromkeys(indices.flatten().tolist()))
