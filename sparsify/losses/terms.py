"""The terms that a loss is made of.

Each is a config that says what it needs of the forward passes. Its value is computed in
`values.py`, so that a config can be read without loading torch. `CONTRIBUTING.md` says how to add
one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from sparsify.settings.base_config import BaseConfig
from sparsify.tlens.hook_names import HookNames

Coeff = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CoeffSchedule(BaseConfig):
    """Course of a coefficient in training: a linear rise from 0, then a line to its end."""

    warmup_samples: NonNegativeInt = 0
    """Samples over which the coefficient rises linearly from 0 to its value."""
    end_factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Factor of the coefficient at the end, which it reaches linearly after the warmup."""

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.warmup_samples == 0 and self.end_factor == 1:
            raise ValueError("changes nothing; set warmup_samples or end_factor, or remove it")
        return self

    def factor(self, n_done: int, n_samples: int) -> float:
        """Factor of the coefficient after `n_done` of `n_samples`."""
        if n_done < self.warmup_samples:
            return n_done / self.warmup_samples
        progress = (n_done - self.warmup_samples) / max(1, n_samples - self.warmup_samples)
        return 1 + (self.end_factor - 1) * min(1.0, progress)


class LossTerm(BaseConfig, ABC):
    """A term of the loss: what it needs of the passes, and the weight of its value.

    `sparsify.losses.values` computes the value.
    """

    schedule: CoeffSchedule | None = None
    """Change of the coefficient in training. null: none."""

    needs_logits: ClassVar[bool] = False
    """The spliced pass must go to the last block and keep the final residual stream. Only with
    `needs_spliced_pass`."""

    needs_raw_logits: ClassVar[bool] = False
    """The raw pass must, too. Only with `needs_logits`."""

    needs_spliced_pass: ClassVar[bool] = True
    """The value depends on the model behind or between the SAEs. Without such a term there is no
    spliced pass: each SAE reads the raw activation."""

    measures_error: ClassVar[bool] = True
    """The value says how well the outputs stand in for the activations. It is also computed for the
    other outputs of SAEs that have some."""

    needs_dead: ClassVar[bool] = False
    """The value depends on which elements are dead."""

    is_of_predictions: ClassVar[bool] = False
    """The value is a mean over the predictions that count, not over the tokens that are kept."""

    @property
    @abstractmethod
    def position_coeff(self) -> float:
        """The weight of the value at each position. At zero it is computed but does not train."""

    def raw_positions(self, sae_positions: Sequence[str]) -> list[str]:
        """Positions at which the raw pass must keep activations."""
        return []

    def spliced_positions(self, sae_positions: Sequence[str]) -> list[str]:
        """Positions at which the spliced pass must keep activations, beyond what the SAEs keep."""
        return []


class CoeffTerm(LossTerm):
    """A term whose coefficient weighs the value at each position."""

    coeff: Coeff
    """Weight of the term. At zero it is computed and logged but does not train."""

    @property
    def position_coeff(self) -> float:
        """The coefficient."""
        return self.coeff


class OutToInLoss(CoeffTerm):
    """Mean squared error between the output of an SAE and its target, the input.

    The target of a transcoder is the activation that its output replaces. Neither side is detached:
    with several SAEs the gradient also reaches the earlier ones.
    """

    needs_spliced_pass: ClassVar[bool] = False


class OutToOrigLoss(CoeffTerm):
    """Mean squared error between the output of an SAE and the raw activation at its position.

    It differs from `out_to_in` behind the first SAE, where the spliced pass reads something else.
    """

    def raw_positions(self, sae_positions: Sequence[str]) -> list[str]:
        """The positions of the SAEs."""
        return list(sae_positions)


class InToOrigLoss(LossTerm):
    """Mean squared error between the activations of the spliced and of the raw pass.

    At a position that has an SAE, the spliced activation is the one that the SAE replaces.
    """

    hook_positions: HookNames
    """Full names of the hook points to compare, or a single one."""

    total_coeff: Coeff
    """Sum of the coefficients, which are equal at all positions."""

    normalised: bool = False
    """True divides each error by the variance of the raw activation at its position, so that those
    of later blocks, which are larger, do not outweigh the others."""

    @field_validator("hook_positions", mode="before")
    @classmethod
    def _compares_something(cls, positions: object) -> object:
        if positions == []:
            raise ValueError("names no hook point; name at least one, or set in_to_orig to null")
        return positions

    @property
    def position_coeff(self) -> float:
        """An equal share of the total coefficient."""
        return self.total_coeff / len(self.hook_positions)

    def raw_positions(self, sae_positions: Sequence[str]) -> list[str]:
        """The hook positions."""
        return list(self.hook_positions)

    def spliced_positions(self, sae_positions: Sequence[str]) -> list[str]:
        """The hook positions, except those that an SAE keeps."""
        return [position for position in self.hook_positions if position not in sae_positions]


class LogitsKLLoss(CoeffTerm):
    """KL(orig || new) of the distributions over the next token, in nats per token."""

    needs_logits: ClassVar[bool] = True
    needs_raw_logits: ClassVar[bool] = True

    balance_with: Literal["out_to_in", "out_to_orig", "in_to_orig"] | None = None
    """Error whose size the KL is brought to: it is multiplied by the ratio of that error to itself,
    which has no gradient (Karvonen 2025). The error is summed over positions, or for in_to_orig
    averaged, as in the loss. null: the KL is taken as it is."""


class NextTokenCELoss(CoeffTerm):
    """Cross-entropy of the spliced model's next token, in nats per prediction that counts.

    It counts if neither its token nor the next one is ignored.
    """

    needs_logits: ClassVar[bool] = True
    is_of_predictions: ClassVar[bool] = True
