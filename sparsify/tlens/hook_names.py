"""Names of hook points: the ones that a pattern means, and the blocks that they need.

`known` is always the names of all hook points of a model, with their aliases: its `hook_dict`.
"""

import re
from collections.abc import Collection, Iterable
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from sparsify.settings.base_config import UserError, listed, nearest

# The bridge's own names for the ends of a block are `hook_in` and `hook_out`.
BLOCK_START = ("hook_resid_pre", "hook_in")
BLOCK_END = ("hook_resid_post", "hook_out")


def _each_once(names: list[str]) -> list[str]:
    if not names:
        raise ValueError("names no hook point; give at least one")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(map(repr, repeated))} is repeated; name it once")
    return names


HookNames = Annotated[list[str], BeforeValidator(listed), AfterValidator(_each_once)]
"""Names that a setting takes: at least one, each once; a single one may stand without a list."""


def check_hook_names(names: Iterable[str], known: Collection[str], setting: str) -> None:
    """Raise a `UserError` that names `setting` if one of the names is not a hook point."""
    for name in names:
        if name not in known:
            raise UserError(f"{setting}: the model has no hook point {nearest(name, known)}")


def matching_hook_names(patterns: Iterable[str], known: Collection[str], setting: str) -> list[str]:
    """Return the hook points that the patterns mean: full names, or runs of their dotted parts.

    `hook_resid_pre` is that hook of every block, `blocks.1` never means block 10.

    Raises:
        UserError: A pattern matches nothing, or a hook point that another has matched.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        is_full = pattern in known
        names = [pattern] if is_full else [n for n in known if f".{pattern}." in f".{n}."]
        if not names:
            # The nearest name, or the nearest last part, whichever the pattern looks like.
            ends = {n.split(".", 2)[-1] for n in known}
            raise UserError(
                f"{setting}: the model has no hook point {nearest(pattern, {*known, *ends})}"
            )
        for name in names:
            if name in found:
                raise UserError(
                    f"{setting}: '{pattern}' repeats '{name}', which '{found[name]}' already "
                    "means; one SAE fits there, so remove one of them"
                )
            found[name] = pattern
    return list(found)


def first_block(name: str) -> int:
    """Number of blocks that have run when the activation at hook point `name` is made."""
    if (match := re.match(r"blocks\.(\d+)\.(.+)", name)) is None:
        return 0  # the embedding: what comes after the blocks is refused by `probe`
    return int(match[1]) + (match[2] in BLOCK_END)


def stop_block(name: str) -> int:
    """Number of blocks to run for the activation at hook point `name` to be there."""
    match = re.match(r"blocks\.(\d+)\.(.+)", name)
    is_inside = match is not None and match[2] not in (*BLOCK_START, *BLOCK_END)
    return first_block(name) + is_inside
