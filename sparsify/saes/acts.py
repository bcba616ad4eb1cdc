"""What an SAE or a cached hook point leaves behind after a forward pass.

Dimensions: `*sample` is any leading batch and position dimensions, `d_act` the width of the
hooked activation, `n_dict` the number of dictionary elements.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SAEActs:
    """One SAE's activations: what it read, its sparse code, and what it wrote."""

    input: Float[Tensor, "*sample d_act"]
    c: Float[Tensor, "*sample n_dict"]
    output: Float[Tensor, "*sample d_act"]


@dataclass(frozen=True)
class CacheActs:
    """The activation at a hook point that has no SAE."""

    input: Float[Tensor, "*sample d_act"]
