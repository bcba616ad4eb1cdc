"""Loss terms that train SAEs inside a frozen model.

Each term is a config that says what it needs of the forward passes and can compute itself from
them. To add one, write its class here, give it a field on `LossConfig` and a test with a value
worked out by hand. Nothing else needs to change. The math is in `sparsify.loss_functions`, which is
imported when a loss is computed, so that a config can be read without loading torch.

The total is the sum of coefficient times value over terms and positions:

    sparsity.coeff    * sum over SAEs of   mean ||c||_p / d_act
    out_to_in.coeff   * sum over SAEs of   mse(output, input)
    out_to_orig.coeff * sum over SAEs of   mse(output, orig)
    in_to_orig.total_coeff * mean over hook_positions of   mse(new, orig)
    logits_kl.coeff   * KL(orig || new), in nats per token
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sparsify.base_config import BaseConfig, PositiveFinite, listed

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.runs import Runs

Coeff = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LossTerm(BaseConfig, ABC):
    """A term of the loss: what it needs, its value, and the weight of that value."""

    needs_logits: ClassVar[bool] = False
    """The runs must go to the last block and keep the final residual stream."""

    needs_spliced_run: ClassVar[bool] = True
    """The value depends on the model behind or between the SAEs. A sum of terms that do without
    needs no spliced run: each SAE reads the raw activation."""

    @property
    @abstractmethod
    def position_coeff(self) -> float:
        """The weight of the value at each position. At zero it is computed but does not train."""

    def raw_positions(self, sae_positions: Sequence[str]) -> list[str]:
        """Positions at which the raw run must keep activations."""
        return []

    def spliced_positions(self, sae_positions: Sequence[str]) -> list[str]:
        """Positions at which the spliced run must keep activations, beyond what the SAEs keep."""
        return []

    @abstractmethod
    def calc(self, runs: "Runs") -> "dict[str, Tensor]":
        """Scalar by position, without the coefficient. The key is "" if it has no position."""


class CoeffTerm(LossTerm):
    """A term whose coefficient weighs the value at each position."""

    coeff: Coeff
    """Weight of the term. At zero it is computed and logged but does not train."""

    @property
    def position_coeff(self) -> float:
        """The coefficient."""
        return self.coeff


class SparsityLoss(CoeffTerm):
    """Mean p-norm of the code, divided by the width of the activation."""

    needs_spliced_run: ClassVar[bool] = False

    p_norm: PositiveFinite = 1.0
    """Exponent of the norm."""

    def calc(self, runs: "Runs") -> "dict[str, Tensor]":
        """See `sparsify.loss_functions.sparsity`."""
        from sparsify.loss_functions import sparsity

        return {
            position: sparsity(acts.c, acts.input.shape[-1], self.p_norm)
            for position, acts in runs.sae_acts.items()
        }


class OutToInLoss(CoeffTerm):
    """Mean squared error between what an SAE writes and what it read.

    Neither side is detached: with several SAEs the gradient also reaches the earlier ones.
    """

    needs_spliced_run: ClassVar[bool] = False

    def calc(self, runs: "Runs") -> "dict[str, Tensor]":
        """See `sparsify.loss_functions.mse`."""
        from sparsify.loss_functions import mse

        return {position: mse(acts.output, acts.input) for position, acts in runs.sae_acts.items()}


class OutToOrigLoss(CoeffTerm):
    """Mean squared error between what an SAE writes and the raw activation at its position.

    It differs from `out_to_in` behind the first SAE, where the spliced run reads something else.
    """

    def raw_positions(self, sae_positions: Sequence[str]) -> list[str]:
        """Those of the SAEs."""
        return list(sae_positions)

    def calc(self, runs: "Runs") -> "dict[str, Tensor]":
        """See `sparsify.loss_functions.mse`."""
        from sparsify.loss_functions import mse

        return {
            position: mse(acts.output, runs.orig_acts[position].detach())
            for position, acts in runs.sae_acts.items()
        }


class InToOrigLoss(LossTerm):
    """Mean squared error between the activations of the spliced and of the raw run.

    At a position that has an SAE, the spliced activation is what the SAE read.
    """

    hook_positions: Annotated[list[str], BeforeValidator(listed)]
    """Full names of the hook points to compare, or a single one."""

    total_coeff: Coeff
    """Sum of the coefficients, which are equal at all positions."""

    @field_validator("hook_positions")
    @classmethod
    def _positions_are_distinct(cls, positions: list[str]) -> list[str]:
        if not positions:
            raise ValueError("names no hook point; name at least one, or set in_to_orig to null")
        repeated = sorted({name for name in positions if positions.count(name) > 1})
        if repeated:
            raise ValueError(f"{', '.join(map(repr, repeated))} is repeated; name it once")
        return positions

    @property
    def position_coeff(self) -> float:
        """An equal share of the total coefficient."""
        return self.total_coeff / len(self.hook_positions)

    def raw_positions(self, sae_positions: Sequence[str]) -> list[str]:
        """The hook positions."""
        return list(self.hook_positions)

    def spliced_positions(self, sae_positions: Sequence[str]) -> list[str]:
        """The hook positions, as far as no SAE keeps them."""
        return [position for position in self.hook_positions if position not in sae_positions]

    def calc(self, runs: "Runs") -> "dict[str, Tensor]":
        """See `sparsify.loss_functions.mse`."""
        from sparsify.loss_functions import mse

        return {
            position: mse(runs.new_acts[position].input, runs.orig_acts[position].detach())
            for position in self.hook_positions
        }


class LogitsKLLoss(CoeffTerm):
    """KL(orig || new) of the distributions over the next token, in nats per token."""

    needs_logits: ClassVar[bool] = True

    def calc(self, runs: "Runs") -> "dict[str, Tensor]":
        """See `sparsify.kernels.chunked.chunked_kl`."""
        from sparsify.kernels.chunked import chunked_kl

        assert runs.orig_resid is not None
        assert runs.new_resid is not None
        assert runs.unembed is not None
        return {"": chunked_kl(runs.orig_resid, runs.new_resid, runs.unembed)}


class LossConfig(BaseConfig):
    """The loss: a weighted sum of terms. Null leaves a term out."""

    sparsity: SparsityLoss | None = None
    """Mean p-norm of the SAEs' codes."""

    in_to_orig: InToOrigLoss | None = None
    """Error at chosen hook points, between the spliced and the raw run."""

    out_to_orig: OutToOrigLoss | None = None
    """Error between an SAE's output and the raw activation."""

    out_to_in: OutToInLoss | None = None
    """Error between an SAE's output and its input."""

    logits_kl: LogitsKLLoss | None = None
    """KL divergence of the spliced model's output from the raw model's."""

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

    def terms(self) -> dict[str, LossTerm]:
        """The terms that are set, by name."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: term for name, term in fields.items() if term is not None}


def total_loss(losses: LossConfig, runs: "Runs") -> "tuple[Tensor, dict[str, Tensor]]":
    """The weighted sum of all terms, and the value of each without its coefficient.

    Returns:
        The scalar to minimise, and detached values keyed `<term>/<position>`, or `<term>` for a
        term that has no position.
    """
    import torch

    total = torch.zeros(())
    values: dict[str, Tensor] = {}
    for name, term in losses.terms().items():
        coeff = term.position_coeff
        with torch.set_grad_enabled(torch.is_grad_enabled() and coeff > 0):
            by_position = term.calc(runs)
        for position, value in by_position.items():
            values[f"{name}/{position}" if position else name] = value.detach()
            if coeff > 0:
                total = total + coeff * value
    return total, values
