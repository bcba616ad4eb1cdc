"""Plan of one training step's passes, derived from the SAE positions and the loss terms.

    tokens ─ shared prefix ─┬─ raw suffix ────── raw activations, raw final residual
                            └─ spliced suffix ── SAE activations, spliced final residual

Before the first SAE the two passes agree, so that part is run once. Each suffix stops at the last
block that a term needs. A mix of terms that only look at what the SAEs themselves read and write
(a *local* mix) needs no spliced pass at all: each SAE is applied to the raw activation.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sparsify.losses.loss import LossConfig
from sparsify.sae_transformer import SAETransformer
from sparsify.settings.base_config import UserError
from sparsify.tlens.hook_names import check_hook_names, first_block, stop_block
from sparsify.tlens.hooked_model import HookedModel


@dataclass(frozen=True)
class ForwardPlan:
    """Blocks that run, and hook points that are kept. Block numbers are stops: exclusive."""

    sae_positions: tuple[str, ...]
    is_local: bool
    """Whether the SAEs are applied to raw activations, without a spliced pass."""
    needs_logits: bool
    """Whether the spliced pass goes to the end and keeps its final residual stream."""
    needs_raw_logits: bool
    """Whether the raw pass does."""
    start: int
    """First block that the two passes do not share."""
    raw_positions: tuple[str, ...]
    """Hook points to keep of the raw pass."""
    raw_stop: int
    spliced_positions: tuple[str, ...]
    """Hook points to keep of the spliced pass, in addition to what the SAEs read and write."""
    spliced_stop: int


def derive_plan(model: SAETransformer, losses: LossConfig) -> ForwardPlan:
    """The least work that gives every loss term what it needs.

    Raises:
        UserError: A term reads a hook point that does not exist, or one at which the two passes
            agree because it lies before the first SAE, or logits that cannot be computed apart.
    """
    hooked, positions = model.hooked_model, tuple(model.raw_sae_positions)
    terms = losses.terms().values()
    is_local = not any(term.needs_spliced_pass for term in terms)
    needs_logits = any(term.needs_logits for term in terms)
    needs_raw_logits = any(term.needs_raw_logits for term in terms)
    raw = _union(term.raw_positions(positions) for term in terms)
    spliced = _union(term.spliced_positions(positions) for term in terms)
    sources = tuple(model.reads.values())
    start = min(first_block(position) for position in sources)
    for name, term in losses.terms().items():
        # Without SAEs, a term asks only for the hook points that its own settings name.
        named = _union([term.raw_positions(()), term.spliced_positions(())])
        if named:
            _check_lie_behind(hooked, named, positions, f"loss.{name}.hook_positions")
    if needs_logits:
        hooked.check_unembedding()
    if is_local:
        raw = _union([raw, sources, positions])
    return ForwardPlan(
        sae_positions=positions,
        is_local=is_local,
        needs_logits=needs_logits,
        needs_raw_logits=needs_raw_logits,
        start=start,
        raw_positions=raw,
        raw_stop=_stop(hooked, raw, needs_raw_logits),
        spliced_positions=spliced,
        spliced_stop=_stop(hooked, (*positions, *spliced), needs_logits),
    )


def _stop(model: HookedModel, positions: Iterable[str], needs_logits: bool) -> int:
    if needs_logits:
        return model.n_blocks
    return max((stop_block(position) for position in positions), default=0)


def _check_lie_behind(
    model: HookedModel,
    hook_positions: tuple[str, ...],
    sae_positions: tuple[str, ...],
    setting: str,
) -> None:
    check_hook_names(hook_positions, model.model.hook_dict, setting)
    in_order = list(model.probe([*sae_positions, *hook_positions], setting))
    n_shared = min(in_order.index(position) for position in sae_positions)
    for position in hook_positions:
        if in_order.index(position) <= n_shared:
            raise UserError(
                f"{setting}: '{position}' does not lie behind the first SAE, at "
                f"'{in_order[n_shared]}', so both passes agree there; name hook points behind it"
            )


def _union(groups: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))
