"""The value of each loss term: one function a term, chosen by the class of its config.

Each binds the settings of its term and what the passes left behind to plain math, which is in
`functions.py`, `dead.py` and `sparsify.kernels`.
"""

from functools import singledispatch

from jaxtyping import Float
from torch import Tensor

from sparsify.kernels.chunked import chunked_cross_entropy, chunked_kl
from sparsify.losses.code_terms import AuxKLoss, PreActLoss, SparsityLoss
from sparsify.losses.dead import aux_k, pre_act
from sparsify.losses.functions import active_share, concave_sparsity, mse, normalised_mse, sparsity
from sparsify.losses.kept import NO_TARGET
from sparsify.losses.passes import Passes
from sparsify.losses.terms import (
    InToOrigLoss,
    LogitsKLLoss,
    LossTerm,
    NextTokenCELoss,
    OutToInLoss,
    OutToOrigLoss,
)

Values = dict[str, Float[Tensor, ""]]
"""A scalar by position. The only key is "" for a term that has no positions."""


@singledispatch
def term_values(term: LossTerm, passes: Passes) -> Values:
    """Compute a term at each of its positions, without its coefficient.

    Raises:
        NotImplementedError: No function is registered for the class of the term.
    """
    raise NotImplementedError(
        f"{type(term).__name__}: no function computes this loss term; write one and decorate it "
        "with @term_values.register, as CONTRIBUTING.md says under 'Add a loss term'"
    )


@term_values.register
def sparsity_values(term: SparsityLoss, passes: Passes) -> Values:
    """Penalty of the code of each SAE."""
    values: Values = {}
    for position, acts in passes.sae_acts.items():
        c, d_act = acts.penalised, acts.input.shape[-1]
        if term.penalty == "l0":
            values[position] = active_share(passes.saes[position], acts)
        elif term.penalty == "p_norm":
            values[position] = sparsity(c, d_act, term.p_norm)
        else:
            values[position] = concave_sparsity(c / term.scale, d_act, term.penalty)
    return values


@term_values.register
def out_to_in_values(term: OutToInLoss, passes: Passes) -> Values:
    """Squared error between the output of each SAE and its target, the input or what it replaces.

    Neither side is detached.
    """
    return {position: mse(acts.output, acts.target) for position, acts in passes.sae_acts.items()}


@term_values.register
def out_to_orig_values(term: OutToOrigLoss, passes: Passes) -> Values:
    """Squared error between the output of each SAE and the raw activation at its position."""
    return {
        position: mse(acts.output, passes.orig_acts[position].detach())
        for position, acts in passes.sae_acts.items()
    }


@term_values.register
def in_to_orig_values(term: InToOrigLoss, passes: Passes) -> Values:
    """Squared error between the spliced and the raw activation at each hook point."""
    error = normalised_mse if term.normalised else mse
    return {
        position: error(passes.arriving(position), passes.orig_acts[position].detach())
        for position in term.hook_positions
    }


@term_values.register
def logits_kl_values(term: LogitsKLLoss, passes: Passes) -> Values:
    """KL(orig || new), before it is balanced."""
    assert passes.orig_resid is not None
    assert passes.new_resid is not None
    assert passes.unembed is not None
    return {"": chunked_kl(passes.orig_resid, passes.new_resid, passes.unembed)}


@term_values.register
def next_token_ce_values(term: NextTokenCELoss, passes: Passes) -> Values:
    """Cross-entropy of the spliced model, averaged over the predictions that count; 0 if none."""
    assert passes.new_resid is not None
    assert passes.unembed is not None
    assert passes.next_tokens is not None
    if not passes.is_masked:  # of each sequence only the last token has no next
        resid, targets = passes.new_resid[:, :-1], passes.next_tokens[:, :-1]
    else:
        counts = passes.next_tokens != NO_TARGET
        if not counts.any():
            return {"": passes.new_resid.new_zeros(())}
        resid, targets = passes.new_resid[counts], passes.next_tokens[counts]
    return {"": chunked_cross_entropy(resid, targets, passes.unembed)}


@term_values.register
def aux_k_values(term: AuxKLoss, passes: Passes) -> Values:
    """Error of the dead elements of each SAE in predicting what the SAE leaves out."""
    return {
        position: aux_k(passes.saes[position], acts, passes.dead[position], term.k)
        for position, acts in passes.sae_acts.items()
    }


@term_values.register
def pre_act_values(term: PreActLoss, passes: Passes) -> Values:
    """Distance of the dead elements of each JumpReLU SAE from firing."""
    return {
        position: pre_act(passes.saes[position], acts, passes.dead[position])
        for position, acts in passes.sae_acts.items()
    }
