"""SAEs by hook point, and the hooks that put them in place."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsify.saes.acts import Acts, CacheActs, SAEActs
from sparsify.saes.base import SAE
from sparsify.settings.base_config import UserError
from sparsify.tlens.hooked_model import Hook

Read = Callable[[str, Tensor, Tensor | None], SAEActs]
"""`read(position, act, replaced)`: what is to be spliced in. `replaced` is None if it is `act`."""


class SAEDict(nn.ModuleDict):
    """SAEs by hook point. Module names may have no dot, so the keys have "-" in its place."""

    def at(self, position: str) -> SAE:
        """The SAE at a hook point, by its full name."""
        sae = self[position.replace(".", "-")]
        assert isinstance(sae, SAE)
        return sae

    def read(
        self,
        position: str,
        act: Float[Tensor, "batch pos ..."],
        replaced: Float[Tensor, "batch pos ..."] | None = None,
    ) -> SAEActs:
        """What the SAE at a hook point makes of an activation, whose heads, if any, are flattened.

        The SAE computes in its own precision, whatever that of the model is.

        Args:
            position: Where the SAE writes.
            act: What it reads.
            replaced: What stands where it writes. None: `act`.
        """
        sae = self.at(position)
        parameter = next(sae.parameters(), None)
        act = act.flatten(start_dim=2)
        with torch.autocast(act.device.type, enabled=False):
            acts = sae(act if parameter is None else act.to(parameter))
        if replaced is None:
            return acts
        return replace(acts, replaced=replaced.flatten(start_dim=2).to(acts.output))


def splice_hooks(
    reads: Mapping[str, str], read: Read, others: Mapping[str, Hook] = MappingProxyType({})
) -> dict[str, Hook]:
    """Hooks that put what `read` makes in place of activations, and those of other hook points.

    Args:
        reads: The hook point that is read, by that which is written.
        read: Makes what is written.
        others: Further hooks. Where an SAE writes they are not called.
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
                f"cache_positions: hook point '{position}' did not fire in this run; leave it out, "
                "or run the entire model if it lies behind the last block"
            )
