"""The loss of a batch: what is minimised, and the values that are logged."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class BatchLoss:
    """Loss of a batch."""

    total: Float[Tensor, ""]
    """Weighted sum of all terms, whose gradient is taken."""

    terms: Mapping[str, Float[Tensor, ""]]
    """Detached value of each term without its coefficient, by term and position."""
