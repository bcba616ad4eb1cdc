"""The forward passes of a training step, as a forward plan says.

Where SAEs have other outputs that are trained too (a prefix of a dictionary, a second path), errors
are measured there as well: locally for each of them, in a spliced mix in one more spliced pass with
one that is drawn for each sequence.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, groupby

import torch
from jaxtyping import Int
from torch import Tensor

from sparsify.losses.kept import targets_of
from sparsify.losses.passes import Passes
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.acts import SAEActs
from sparsify.splicing.hooks import Acts, Read, cache_hooks, keep_hooks, splice_hooks
from sparsify.tlens.hooked_model import Prefix
from sparsify.training.forward_plan import ForwardPlan


def forward_passes(
    model: SAETransformer, tokens: Int[Tensor, "batch pos"], plan: ForwardPlan
) -> Passes:
    """The raw and the spliced pass of a batch, as far as `plan` says.

    Gradients reach the SAEs alone.
    """
    hooked = model.hooked_model
    saes = {position: model.saes.at(position) for position in plan.sae_positions}
    orig_acts: dict[str, Tensor] = {}
    with torch.no_grad():
        prefix = hooked.prefix(tokens, plan.start)
        raw_hooks = keep_hooks(plan.raw_positions, orig_acts)
        has_raw = bool(plan.raw_positions) or plan.needs_raw_logits
        orig_resid = hooked.run(prefix, raw_hooks, plan.raw_stop) if has_raw else None
    orig_acts = {position: act.flatten(start_dim=2) for position, act in orig_acts.items()}
    if plan.is_local:
        _, new_acts = model(None, plan.sae_positions, orig_acts=orig_acts)
        return _with_other_outputs(Passes(orig_acts, new_acts, saes=saes))
    passes = Passes(orig_acts, {}, saes=saes)
    if plan.needs_logits:
        passes = replace(
            passes,
            orig_resid=orig_resid if plan.needs_raw_logits else None,
            unembed=hooked.unembed,
            next_tokens=targets_of(tokens),
        )
    passes = _with_spliced_pass(passes, model, prefix, plan, model.saes.read)
    return _with_other_pass(passes, model, prefix, plan)


def _with_spliced_pass(
    passes: Passes, model: SAETransformer, prefix: Prefix, plan: ForwardPlan, read: Read
) -> Passes:
    acts = Acts()

    def read_and_keep(position: str, act: Tensor, replaced: Tensor | None) -> SAEActs:
        # The other outputs, too, are computed in the SAE's own precision.
        with torch.autocast(act.device.type, enabled=False):
            acts[position] = made = read(position, act, replaced)
        return made

    reads = {position: model.reads[position] for position in plan.sae_positions}
    hooks = splice_hooks(reads, read_and_keep, cache_hooks(plan.spliced_positions, acts))
    resid = model.hooked_model.run(prefix, hooks, plan.spliced_stop)
    return replace(passes, new_acts=acts, new_resid=resid if plan.needs_logits else None)


def _with_other_outputs(passes: Passes) -> Passes:
    """The passes, and the same with each of the SAEs' other outputs."""
    weights = next(iter(passes.saes.values())).other_weights
    others = []
    for index, weight in enumerate(weights):
        acts = {
            position: replace(acts, output=passes.saes[position].other_output(acts, index))
            for position, acts in passes.sae_acts.items()
        }
        others.append((weight, replace(passes, new_acts={**passes.new_acts, **acts})))
    return replace(passes, others=tuple(others))


def _with_other_pass(
    passes: Passes, model: SAETransformer, prefix: Prefix, plan: ForwardPlan
) -> Passes:
    """The passes, and a spliced one in which each sequence has one of the SAEs' other outputs.

    Its weight is the sum of theirs, so that on average its errors are the weighted sum of those of
    all. SAEs that are trained switch to it together; a frozen one writes what it does in use.
    """
    first = plan.sae_positions[0]
    weights = passes.saes[first].other_weights
    if not weights:
        return passes
    start = float(torch.rand(())) if len(weights) > 1 else 0.0
    drawn = drawn_outputs(weights, len(passes.sae_acts[first].output), start)

    def read_other(position: str, act: Tensor, replaced: Tensor | None) -> SAEActs:
        # What comes before the first SAE is the same in both passes, and so is its code.
        acts = (
            passes.sae_acts[first]
            if position == first
            else model.saes.read(position, act, replaced)
        )
        sae = passes.saes[position]
        if not sae.is_trained:
            return acts
        outputs = [sae.other_output(acts.only(rows), index) for index, rows in drawn]
        return replace(acts, output=torch.cat(outputs))

    other = _with_spliced_pass(passes, model, prefix, plan, read_other)
    return replace(passes, others=((sum(weights), other),))


def drawn_outputs(
    weights: Sequence[float], n_sequences: int, start: float
) -> list[tuple[int, slice]]:
    """Indices of other outputs, each with the neighbouring sequences of a batch that have it.

    The weights stand in turn around a circle, and the sequences at equal steps, from a place that
    is drawn. So a sequence gets each output with a chance in proportion to its weight, and a batch
    as many of each as it can.

    Args:
        weights: Weights of the other outputs.
        n_sequences: Sequences in the batch.
        start: Place of the first sequence, drawn from [0, 1).
    """
    ends = [end / sum(weights) for end in accumulate(weights)]
    places = ((start + number / n_sequences) % 1 for number in range(n_sequences))
    found = [min(bisect_right(ends, place), len(weights) - 1) for place in places]
    drawn, begin = [], 0
    for index, group in groupby(found):
        end = begin + len(list(group))
        drawn.append((index, slice(begin, end)))
        begin = end
    return drawn
