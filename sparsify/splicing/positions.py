"""Positions where SAEs read and write, and how wide the activations are there."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod

from torch import nn

from sparsify.saes.base import SAE
from sparsify.settings.base_config import UserError
from sparsify.tlens.hook_names import check_hook_names
from sparsify.tlens.hooked_model import HookedModel


def as_names(given: Sequence[str] | str | None) -> list[str]:
    """Names as a list, of which a single one may stand alone. None: no names."""
    if given is None:
        return []
    return [given] if isinstance(given, str) else list(given)


def check_have_saes(positions: Iterable[str], existing: Collection[str], setting: str) -> None:
    """Raise a `UserError` that names `setting` if there is no SAE at one of the positions."""
    for position in positions:
        if position not in existing:
            raise UserError(
                f"{setting}: there is no SAE at '{position}', only at {', '.join(existing)}"
            )


def check_fits(sae: SAE, position: str, d_act: int, d_out: int | None) -> None:
    """See that an SAE suits the activations where it is put.

    Args:
        sae: The SAE.
        position: Hook point where it writes.
        d_act: Width of what it reads.
        d_out: Width of what it writes, if it reads another hook point. None: it does not.

    Raises:
        UserError: It does not.
    """
    if (sae.d_act, sae.d_out) != (d_act, d_out or d_act):
        widths = f"{d_act}" if d_out is None else f"{d_act} and {d_out}"
        raise UserError(
            f"the SAE at {position} reads activations of width {sae.d_act} and writes {sae.d_out}, "
            f"but those of the model have {widths}; check the model and the hook point"
        )


def reads_of(positions: list[str], sources: list[str]) -> dict[str, str]:
    """The hook point that each SAE reads, by the one where it writes.

    Args:
        positions: Hook points where they write.
        sources: Hook points that they read, in the same order. Empty: SAEs read where they write.

    Raises:
        UserError: The sources do not suit the positions.
    """
    if not sources:
        return {position: position for position in positions}
    if len(sources) != len(positions):
        raise UserError(
            f"read_positions: names {len(sources)} hook points ({', '.join(sources)}), but there "
            f"are {len(positions)} sae_positions ({', '.join(positions)}); name one for each"
        )
    for position, source in zip(positions, sources, strict=True):
        if position == source:
            raise UserError(_reads_what_it_writes(source))
    return dict(zip(positions, sources, strict=True))


def act_widths(
    model: HookedModel, positions: list[str], reads: Mapping[str, str]
) -> dict[str, int]:
    """Width of one token's activation where SAEs read and write, in the order of the model.

    Raises:
        UserError: A position repeats, is not a hook point, or has no activation vector per token,
            or what is read does not come before what is written.
    """
    known = model.model.hook_dict
    if not positions:
        raise UserError("sae_positions: names no hook point; give at least one")
    if repeated := sorted({p for p in positions if positions.count(p) > 1}):
        raise UserError(f"sae_positions: {', '.join(repeated)} given twice; one SAE fits there")
    check_hook_names(positions, known, "sae_positions")
    names_of_points: dict[nn.Module, str] = {}
    for position in positions:
        other = names_of_points.setdefault(known[position], position)
        if other != position:
            raise UserError(
                f"sae_positions: '{other}' and '{position}' are the same hook point; one SAE "
                "fits there, so remove one of them"
            )
    check_hook_names(reads.values(), known, "read_positions")
    for position, source in reads.items():
        if source != position and known[source] is known[position]:
            raise UserError(_reads_what_it_writes(source))
    if sources := [name for name in dict.fromkeys(reads.values()) if name not in positions]:
        model.probe(sources, "read_positions")
    shapes = model.probe(dict.fromkeys([*reads.values(), *positions]), "sae_positions")
    in_order = list(shapes)
    for position, source in reads.items():
        if in_order.index(source) > in_order.index(position):
            raise UserError(
                f"read_positions: '{source}' lies behind '{position}', where its SAE "
                "writes; name a hook point before it"
            )
    return {name: prod(shape) for name, shape in shapes.items()}


def _reads_what_it_writes(source: str) -> str:
    return (
        f"read_positions: '{source}' is also where its SAE writes; name a hook point before "
        "it, or leave read_positions out"
    )
