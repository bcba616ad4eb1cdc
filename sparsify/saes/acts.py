"""What an SAE or a cached hook point leaves behind after a forward pass.

Dimensions: `*sample` is any leading batch and position dimensions, `d_act` the width of the
hooked activation, `d_out` of what is written in its place or another's, `n_dict` the number of
dictionary elements.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class SAEActs:
    """One SAE's activations: what it read, its sparse code, and what it wrote."""

    input: Float[Tensor, "*sample d_act"]
    c: Float[Tensor, "*sample n_dict"]
    output: Float[Tensor, "*sample d_out"]

    replaced: Float[Tensor, "*sample d_out"] | None = None
    """What stood in the output's place. None: the input, but for a transcoder."""

    pre_acts: Float[Tensor, "*sample n_dict"] | None = None
    """What the code was made of, where a loss of the kind reads it."""

    gates: Float[Tensor, "*sample n_dict"] | None = None
    """How far the gates of a gated SAE are open, 0 where they are closed. None: there are none."""

    @property
    def penalised(self) -> Float[Tensor, "*sample n_dict"]:
        """What a sparsity penalty is to make small, none of it negative: the gates, or the code."""
        return self.c if self.gates is None else self.gates

    @property
    def target(self) -> Float[Tensor, "*sample d_out"]:
        """What the output is to be like: that in whose place it stands."""
        return self.input if self.replaced is None else self.replaced

    def only(self, kept: Bool[Tensor, "batch pos"]) -> "SAEActs":
        """What is there of some tokens; these are then in one dimension."""
        return SAEActs(
            input=self.input[kept],
            c=self.c[kept],
            output=self.output[kept],
            replaced=None if self.replaced is None else self.replaced[kept],
            pre_acts=None if self.pre_acts is None else self.pre_acts[kept],
            gates=None if self.gates is None else self.gates[kept],
        )


@dataclass(frozen=True)
class CacheActs:
    """The activation at a hook point that has no SAE."""

    input: Float[Tensor, "*sample d_act"]

    def only(self, kept: Bool[Tensor, "batch pos"]) -> "CacheActs":
        """What is there of some tokens; these are then in one dimension."""
        return CacheActs(self.input[kept])
