"""The weighted sum of the loss terms. Its formula is at the top of `loss.py`."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.losses.terms import LossTerm
from sparsify.losses.values import Values, term_values

Factor = Callable[[str, str], float | Tensor]
"""Factor of a coefficient at this time, by term and position ("" for a term that has none)."""

KL_EPS = 1e-8
"""Added to a KL that is divided by, as Karvonen 2025 does."""


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

    total = sum((weighted(name, part) for name, part in values.items()), torch.zeros(()))
    errors = {name: term for name, term in terms.items() if term.measures_error}
    for weight, other in passes.others:
        for name, term in errors.items():
            part = _values(term, other)
            total = total + weight * weighted(name, part)
            logged |= _logged(f"other_outputs/{name}", part)
    return total, logged


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
