"""Activations of SAEs, and of cached hook points, in a forward pass.

Each prints as a line, without its numbers.

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
    """Activation that the output replaces. None: the input, as in all kinds except a transcoder."""

    pre_acts: Float[Tensor, "*sample n_dict"] | None = None
    """Pre-activations that the code was made of. None: no loss of the kind reads them."""

    gates: Float[Tensor, "*sample n_dict"] | None = None
    """How far the gates of a gated SAE are open, 0 where they are closed. None: no gates."""

    norms: Float[Tensor, " n_dict"] | None = None
    """Norms of the dictionary elements where they are free. None: 1."""

    def __repr__(self) -> str:
        l0 = (self.c != 0).sum(dim=-1).float().mean().item()
        return (
            f"SAEActs(input={tuple(self.input.shape)}, c={tuple(self.c.shape)}, "
            f"output={tuple(self.output.shape)}, L0={l0:.4g})"
        )

    @property
    def penalised(self) -> Float[Tensor, "*sample n_dict"]:
        """Values that a sparsity penalty makes small, none negative: the gates, or the code.

        Times the norms of elements, if these are free: a penalty would else be lowered by elements
        that grow while their entries shrink.
        """
        values = self.c if self.gates is None else self.gates
        return values if self.norms is None else values * self.norms

    @property
    def target(self) -> Float[Tensor, "*sample d_out"]:
        """Activation that the output replaces, and is to reconstruct."""
        return self.input if self.replaced is None else self.replaced

    def only(self, kept: Bool[Tensor, "batch pos"] | slice) -> "SAEActs":
        """The rows where `kept` is true, in one dimension, or the sequences of a slice."""
        return SAEActs(
            input=self.input[kept],
            c=self.c[kept],
            output=self.output[kept],
            replaced=None if self.replaced is None else self.replaced[kept],
            pre_acts=None if self.pre_acts is None else self.pre_acts[kept],
            gates=None if self.gates is None else self.gates[kept],
            norms=self.norms,
        )


@dataclass(frozen=True)
class CacheActs:
    """The activation at a hook point that has no SAE."""

    input: Float[Tensor, "*sample d_act"]

    def __repr__(self) -> str:
        return f"CacheActs(input={tuple(self.input.shape)})"

    def only(self, kept: Bool[Tensor, "batch pos"]) -> "CacheActs":
        """The rows where `kept` is true, in one dimension."""
        return CacheActs(self.input[kept])


class Acts(dict[str, SAEActs | CacheActs]):
    """Activations by hook point. Each prints on a line of its own."""

    def __repr__(self) -> str:
        return "\n".join(f"{position}: {acts!r}" for position, acts in self.items()) or "{}"
