"""Hooks that put SAEs in place, and those that keep activations."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from torch import Tensor

from sparsify.saes.acts import Acts, CacheActs, SAEActs
from sparsify.settings.base_config import UserError
from sparsify.tlens.hooked_model import Hook

Read = Callable[[str, Tensor, Tensor | None], SAEActs]
"""`read(position, act, replaced)` returns what to splice in. `replaced` is None if it is `act`."""


def splice_hooks(
    reads: Mapping[str, str], read: Read, others: Mapping[str, Hook] = MappingProxyType({})
) -> dict[str, Hook]:
    """Hooks that put what `read` makes in place of activations, and those of other hook points.

    Args:
        reads: The hook point that each SAE reads, by the one where it writes.
        read: Makes what is written.
        others: Other hooks. Where an SAE writes they are not called.
    """
    seen: dict[str, Tensor] = {}

    def splice(position: str) -> Hook:
        def hook(act: Tensor) -> Tensor:
            source = reads[position]
            acts = (
                read(position, act, None)
                if source == position
                else read(position, seen[source], act)
            )
            return acts.output.to(act).reshape(act.shape)

        return hook

    hooks = {**others, **{position: splice(position) for position in reads}}
    sources = [source for position, source in reads.items() if source != position]
    for source in dict.fromkeys(sources):
        hooks[source] = _then_keep(hooks.get(source), source, seen)
    return hooks


def _then_keep(first: Hook | None, name: str, acts: dict[str, Tensor]) -> Hook:
    def hook(act: Tensor) -> Tensor | None:
        replaced = None if first is None else first(act)
        acts[name] = act if replaced is None else replaced
        return replaced

    return hook


def keep_hooks(positions: Iterable[str], acts: dict[str, Tensor]) -> dict[str, Hook]:
    """Hooks that put the activation at each position into `acts`."""

    def keep(position: str) -> Hook:
        def hook(act: Tensor) -> None:
            acts[position] = act

        return hook

    return {position: keep(position) for position in positions}


def cache_hooks(positions: Iterable[str], acts: Acts) -> dict[str, Hook]:
    """Hooks that put the activation at each position, heads flattened, into `acts`."""

    def keep(position: str) -> Hook:
        def hook(act: Tensor) -> None:
            acts[position] = CacheActs(act.flatten(start_dim=2))

        return hook

    return {position: keep(position) for position in positions}


def check_fired(positions: Iterable[str], acts: Mapping[str, object]) -> None:
    """Raise a `UserError` if a hook point that was to be cached has left nothing."""
    for position in positions:
        if position not in acts:
            raise UserError(
                f"cache_positions: hook point '{position}' did not fire in this pass; leave it "
                "out, or run the entire model if it lies behind the last block"
            )
