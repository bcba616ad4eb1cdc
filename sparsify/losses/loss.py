"""The loss that trains SAEs inside a frozen model: a weighted sum of terms.

The total is the sum of coefficient times value over terms and positions:

    sparsity.coeff         * sum over SAEs of   mean penalty of c / d_act
    out_to_in.coeff        * sum over SAEs of   mse(output, target)
    out_to_orig.coeff      * sum over SAEs of   mse(output, orig)
    in_to_orig.total_coeff * mean over hook_positions of   mse(new, orig)
    logits_kl.coeff        * KL(orig || new), in nats per token
    next_token_ce.coeff    * cross-entropy of new, in nats per prediction that counts
    aux_k.coeff            * sum over SAEs of   error of dead elements
    pre_act.coeff          * sum over SAEs of   distance of dead elements from firing

The target is the input, or, for a transcoder, the activation that its output replaces. Schedules,
`target_l0` and `balance_with` multiply coefficients; mse at later hook points is divided by the
variance there if `normalised`. If SAEs have other outputs (`Passes.others`), the errors of these
are added.

The terms are in `terms.py` and `code_terms.py`, and `total.py` computes the sum. CONTRIBUTING.md
says how to add a term.
"""

from typing import Self

from pydantic import model_validator

from sparsify.losses.code_terms import AuxKLoss, PreActLoss, SparsityLoss
from sparsify.losses.terms import (
    InToOrigLoss,
    LogitsKLLoss,
    LossTerm,
    NextTokenCELoss,
    OutToInLoss,
    OutToOrigLoss,
)
from sparsify.saes.config import SAEConfig, kinds_where
from sparsify.settings.base_config import BaseConfig


class LossConfig(BaseConfig):
    """The loss: a weighted sum of terms. Null leaves a term out."""

    sparsity: SparsityLoss | None = None
    """Mean penalty of the SAEs' codes."""

    in_to_orig: InToOrigLoss | None = None
    """Error at chosen hook points, between the spliced and the raw pass."""

    out_to_orig: OutToOrigLoss | None = None
    """Error between an SAE's output and the raw activation."""

    out_to_in: OutToInLoss | None = None
    """Error between an SAE's output and its input."""

    logits_kl: LogitsKLLoss | None = None
    """KL divergence of the spliced model's output from the raw model's."""

    next_token_ce: NextTokenCELoss | None = None
    """Cross-entropy of the spliced model."""

    aux_k: AuxKLoss | None = None
    """Has dead elements make up for what the others leave out."""

    pre_act: PreActLoss | None = None
    """Pulls the pre-activations of dead JumpReLU elements up to their thresholds."""

    @model_validator(mode="after")
    def _some_term_trains(self) -> Self:
        names = ", ".join(type(self).model_fields)
        terms = self.terms()
        if not terms:
            raise ValueError(f"has no term, so there is nothing to train; set one of {names}")
        if all(term.position_coeff == 0 for term in terms.values()):
            raise ValueError(
                f"{', '.join(terms)}: every coefficient is 0, so there is nothing to train; "
                f"set one above 0"
            )
        return self

    @model_validator(mode="after")
    def _what_balances_is_there(self) -> Self:
        name = self.logits_kl.balance_with if self.logits_kl else None
        if name is not None and getattr(self, name) is None:
            raise ValueError(
                f"logits_kl.balance_with: {name} is null; set it, or remove balance_with"
            )
        return self

    def terms(self) -> dict[str, LossTerm]:
        """The terms that are set, by name."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: term for name, term in fields.items() if term is not None}


def why_dense(losses: LossConfig, sae: SAEConfig) -> str | None:
    """Say why SAEs are not trained to be sparse. None: their kind, or the loss, sees to it.

    It may be meant, as in a control, so it is a warning and no error.
    """
    sparsity = losses.sparsity
    if sae.n_active is not None or (sparsity is not None and sparsity.coeff > 0):
        return None
    setting = "loss.sparsity is null" if sparsity is None else "loss.sparsity.coeff is 0"
    return (
        f"{setting}, so nothing makes SAEs of kind '{sae.kind}' sparse; set loss.sparsity.coeff, "
        "or take a kind with saes.k"
    )


def check_loss_suits_kind(losses: LossConfig, sae: SAEConfig) -> None:
    """Raise a `ValueError` if a term has no meaning for SAEs of this kind."""
    with_thresholds = kinds_where(lambda kind: kind.has_thresholds)
    sparsity = losses.sparsity
    if sparsity is not None and not sae.code_has_gradient:
        raise ValueError(
            f"loss.sparsity: SAEs of kind '{sae.kind}' have nothing to penalise; set it to null, "
            "and saes.k to the number of active elements"
        )
    if sparsity is not None and sparsity.target_l0 is not None and sae.n_active is not None:
        raise ValueError(
            f"loss.sparsity.target_l0 ({sparsity.target_l0:g}): saes.k ({sae.n_active}) decides "
            "how many elements are active; remove target_l0"
        )
    if sparsity is not None and sparsity.penalty == "l0" and not sae.has_thresholds:
        raise ValueError(
            f"loss.sparsity.penalty (l0) has no gradient in SAEs of kind '{sae.kind}', only in "
            f"{with_thresholds}; choose p_norm, tanh or log"
        )
    if losses.pre_act is not None and not sae.has_thresholds:
        raise ValueError(
            f"loss.pre_act: belongs to kind {with_thresholds}, not to '{sae.kind}'; set it to null"
        )
    if losses.aux_k is not None and not sae.has_pre_acts:
        raise ValueError(
            f"loss.aux_k: elements of kind '{sae.kind}' have no pre-activations; set it to null, "
            "and take resampling"
        )
