"""The way from a model's final residual stream to its logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Unembedding:
    """Logits of a final residual stream: `transform(norm(resid) @ weight + bias)`.

    Dimensions: `*sample` is any leading batch and position dimensions.
    """

    weight: Float[Tensor, "d_model d_vocab"]

    bias: Float[Tensor, " d_vocab"] | None = None

    norm: Callable[[Tensor], Tensor] | None = None
    """The final norm, of each row by itself. None: the model has none."""

    transform: Callable[[Tensor], Tensor] | None = None
    """Function of each logit by itself, such as a soft cap. None: the identity."""

    is_compiled: bool = False
    """True computes losses of the logits by compiled kernels, if such kernels exist."""

    def __call__(self, resid: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample d_vocab"]:
        """The logits."""
        return self.transformed(F.linear(self.normed(resid), self.weight.T, self.bias))

    @property
    def d_vocab(self) -> int:
        """Number of tokens that have a logit."""
        return self.weight.shape[1]

    def normed(self, resid: Float[Tensor, "*sample d_model"]) -> Float[Tensor, "*sample d_model"]:
        """The first step: the rows that are multiplied with the weight."""
        return resid if self.norm is None else self.norm(resid)

    def products(
        self, normed: Float[Tensor, "row d_model"], buffer: Float[Tensor, "size d_vocab"]
    ) -> Float[Tensor, "row d_vocab"]:
        """The second step, written into the first rows of `buffer`. Without gradients."""
        out = buffer[: len(normed)]
        if self.bias is None:
            return torch.mm(normed, self.weight, out=out)
        return torch.addmm(self.bias, normed, self.weight, out=out)

    def transformed(
        self, products: Float[Tensor, "*sample d_vocab"]
    ) -> Float[Tensor, "*sample d_vocab"]:
        """The last step."""
        return products if self.transform is None else self.transform(products)
