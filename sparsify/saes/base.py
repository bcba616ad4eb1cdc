"""What every kind of SAE has in common.

Dimensions: `*sample` is any leading batch and position dimensions, `d_act` the width of the
hooked activation, `n_dict` the number of dictionary elements.
"""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from sparsify.saes.acts import SAEActs


class SAE(nn.Module, ABC):
    """A sparse autoencoder: `encode` makes a sparse code, `decode` an activation from it."""

    row_sparse_grads: bool = False
    """Whether gradients of matrices may be sparse COO tensors, which hold the rows of active
    elements alone. The optimizer must take them, as that of `build_adam` does."""

    def __init__(self, d_act: int, n_dict: int) -> None:
        super().__init__()
        self.d_act = d_act
        self.n_dict = n_dict

    @abstractmethod
    def encode(self, input: Float[Tensor, "*sample d_act"]) -> Float[Tensor, "*sample n_dict"]:
        """The sparse code `c` of an activation."""

    @abstractmethod
    def decode(self, c: Float[Tensor, "*sample n_dict"]) -> Float[Tensor, "*sample d_act"]:
        """The activation that a sparse code stands for."""

    @property
    @abstractmethod
    def dict_elements(self) -> Float[Tensor, "n_dict d_act"]:
        """The directions that the code's entries write, each of unit norm."""

    def forward(self, input: Float[Tensor, "*sample d_act"]) -> SAEActs:
        """The input, its code and its reconstruction."""
        c = self.encode(input)
        return SAEActs(input=input, c=c, output=self.decode(c))
