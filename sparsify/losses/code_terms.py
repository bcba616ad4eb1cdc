"""The configs of loss terms that are about an SAE's code: its sparsity, and its dead elements.

They need neither the spliced pass nor logits, and do not measure how well an output stands in for
an activation.
"""

from typing import ClassVar, Literal, Self

from pydantic import NonNegativeInt, model_validator

from sparsify.losses.terms import CoeffTerm
from sparsify.settings.base_config import Count, PositiveFinite


class CodeTerm(CoeffTerm):
    """A term about the code."""

    needs_spliced_pass: ClassVar[bool] = False
    measures_error: ClassVar[bool] = False


class SparsityLoss(CodeTerm):
    """Mean penalty of the code, by default its p-norm, divided by the width of the activation."""

    penalty: Literal["p_norm", "tanh", "log", "l0"] = "p_norm"
    """p_norm: the p-norm. tanh: sum of tanh(c / scale). log: sum of log(1 + c / scale). l0: the
    number of active elements, with JumpReLU's straight-through gradient."""
    p_norm: PositiveFinite = 1.0
    """Exponent of the norm."""
    scale: PositiveFinite = 1.0
    """Size of the activations at which the penalties tanh and log bend."""
    target_l0: PositiveFinite | None = None
    """Active elements per token. For each SAE that is trained a controller moves the coefficient,
    which starts at `coeff`, to reach them. null: the coefficient stays."""
    target_warmup_samples: NonNegativeInt = 0
    """Samples over which the target moves from the L0 at the start to target_l0, by equal factors.
    Where elements that have stopped firing hardly come back, as in JumpReLU SAEs, L0 must not fall
    below its target."""

    @model_validator(mode="after")
    def _settings_are_of_the_penalty(self) -> Self:
        of = {"p_norm": ("p_norm",), "scale": ("tanh", "log")}
        for name, penalties in of.items():
            if name in self.model_fields_set and self.penalty not in penalties:
                if getattr(self, name) == type(self).model_fields[name].default:
                    continue
                raise ValueError(
                    f"{name} ({getattr(self, name)}) belongs to penalty {' and '.join(penalties)}, "
                    f"not to '{self.penalty}'; remove it"
                )
        if self.target_l0 is None and self.target_warmup_samples > 0:
            raise ValueError(
                f"target_warmup_samples ({self.target_warmup_samples}) belongs to target_l0, which "
                "is null; set that, or remove it"
            )
        if self.target_l0 is not None and self.schedule is not None:
            raise ValueError(
                f"schedule and target_l0 ({self.target_l0:g}) both move the coefficient; remove one"
            )
        if self.target_l0 is not None and self.coeff == 0:
            raise ValueError(
                "coeff (0) is where the controller of target_l0 starts, and it multiplies; set it "
                "above 0"
            )
        return self


class AuxKLoss(CodeTerm):
    """Error of dead elements in making up for what the SAE leaves out (Gao et al. 2024)."""

    needs_dead: ClassVar[bool] = True

    k: Count | None = None
    """Dead elements used on a token. null: half the width of the activation, as in the paper."""


class PreActLoss(CodeTerm):
    """Distance of the pre-activations of dead JumpReLU elements from their thresholds."""

    needs_dead: ClassVar[bool] = True
