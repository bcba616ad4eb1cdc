"""The weighted sum of the loss terms. Its formula is at the top of `loss.py`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.losses.terms import LossTerm
from sparsify.losses.values import Values, term_values

Factor = Callable[[str, str], float | Tensor]
"""Factor of a coefficient at this time, by term and position ("" for a term that has none)."""

Weighted = list[tuple[LossTerm, Float[Tensor, ""]]]
"""Terms, each with its contribution to the total."""

KL_EPS = 1e-8
"""Added to a KL that is divided by, as Karvonen 2025 does."""


@dataclass(frozen=True)
class MeanLoss:
    """A part of a batch's loss that is a mean over some of its items."""

    mean: Float[Tensor, ""]

    n: int
    """Items of the batch. If there are none, the mean says nothing and has no gradient."""


def total_loss(
    losses: LossConfig, passes: Passes, factor: Factor = lambda term, position: 1.0
) -> tuple[Float[Tensor, ""], Values]:
    """Compute the weighted sum of all terms, and the value of each without its coefficient.

    If SAEs have other outputs, the errors of these are added, with their weights.

    Args:
        losses: Terms and their coefficients.
        passes: The passes of a batch.
        factor: Factors of the coefficients.

    Returns:
        The scalar to minimise, and detached values keyed `<term>/<position>`, or `<term>` for a
        term that has no position; those of other outputs begin with `other_outputs/`.
    """
    weighted, logged = _weighted_terms(losses, passes, factor)
    return _sum(part for _, part in weighted), logged


def mean_losses(
    losses: LossConfig, passes: Passes, factor: Factor = lambda term, position: 1.0
) -> tuple[list[MeanLoss], Values]:
    """Compute the total of `total_loss` in parts that say over how many items they are means.

    If tokens were left out and there is a term about predictions, the parts are that of the terms
    about tokens and that of those about predictions. Else there is one. A batch in which no token
    is kept has none, and no values.
    """
    if passes.n_tokens == 0:
        return [], {}
    weighted, logged = _weighted_terms(losses, passes, factor)
    of_predictions = [part for term, part in weighted if term.is_of_predictions]
    if not (passes.is_masked and of_predictions):
        return [MeanLoss(_sum(part for _, part in weighted), passes.n_tokens)], logged
    of_tokens = [part for term, part in weighted if not term.is_of_predictions]
    return [
        MeanLoss(_sum(of_tokens), passes.n_tokens),
        MeanLoss(_sum(of_predictions), passes.n_predictions),
    ], logged


def _sum(parts: Iterable[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    return sum(parts, torch.zeros(()))


def _weighted_terms(losses: LossConfig, passes: Passes, factor: Factor) -> tuple[Weighted, Values]:
    """Compute the contributions to the total, and the values that are logged."""
    terms = losses.terms()
    values = {name: _values(term, passes) for name, term in terms.items()}
    logged: Values = {}
    for name, by_position in values.items():
        logged |= _logged(name, by_position)
    balance = _balance(losses, values)
    if balance is not None:
        logged["logits_kl_balance"] = balance

    def weighted(name: str, by_position: Values) -> Float[Tensor, ""]:
        coeff = terms[name].position_coeff
        if coeff == 0:
            return torch.zeros(())
        part = sum(
            (coeff * factor(name, position) * value for position, value in by_position.items()),
            torch.zeros(()),
        )
        return part if balance is None or name != "logits_kl" else balance * part

    parts = [(terms[name], weighted(name, part)) for name, part in values.items()]
    errors = {name: term for name, term in terms.items() if term.measures_error}
    for weight, other in passes.others:
        for name, term in errors.items():
            part = _values(term, other)
            parts.append((term, weight * weighted(name, part)))
            logged |= _logged(f"other_outputs/{name}", part)
    return parts, logged


def _values(term: LossTerm, passes: Passes) -> Values:
    """Compute the values of a term, with gradients if it trains."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and term.position_coeff > 0):
        return term_values(term, passes)


def _logged(name: str, by_position: Values) -> Values:
    return {
        f"{name}/{position}" if position else name: value.detach()
        for position, value in by_position.items()
    }


def _balance(losses: LossConfig, values: dict[str, Values]) -> Float[Tensor, ""] | None:
    """Ratio of the error that the KL is balanced with to the KL. None: it is not balanced."""
    name = losses.logits_kl.balance_with if losses.logits_kl else None
    if name is None:
        return None
    errors = torch.stack(list(values[name].values()))
    error = errors.mean() if name == "in_to_orig" else errors.sum()
    # Only rounding puts a KL below zero.
    return (error / (values["logits_kl"][""].clamp(min=0) + KL_EPS)).detach()
