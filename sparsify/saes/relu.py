"""The ReLU SAE of Braun et al. 2024 (arXiv:2405.12241).

    c = relu(W_enc input + b_enc)
    output = D c + b_dec

where the columns of D are those of the decoder's weight, scaled to unit norm in every forward
pass. The weight itself keeps whatever norm the optimizer gives it. The input is not centred.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.saes.base import SAE


class ReLUSAE(SAE):
    """ReLU code, unit-norm dictionary elements.

    The decoder starts with orthonormal rows (or columns, if it has fewer columns than rows), the
    encoder and both biases as any `nn.Linear` does. The names of the parameters are those of the
    original system's checkpoints.
    """

    def __init__(self, d_act: int, n_dict: int) -> None:
        super().__init__(d_act, n_dict)
        self.encoder = nn.Sequential(nn.Linear(d_act, n_dict), nn.ReLU(inplace=True))
        self.decoder = nn.Linear(n_dict, d_act)
        nn.init.orthogonal_(self.decoder.weight)

    def encode(self, input: Float[Tensor, "*sample d_act"]) -> Float[Tensor, "*sample n_dict"]:
        """Non-negative activations of the dictionary elements."""
        return self.encoder(input)

    def decode(self, c: Float[Tensor, "*sample n_dict"]) -> Float[Tensor, "*sample d_act"]:
        """Sum of the dictionary elements, weighted by `c`, plus the decoder's bias."""
        # Scaling c instead of the decoder is equal, but c is the larger of the two as soon as there
        # are more samples than d_act.
        return F.linear(c, self.dict_elements.T, self.decoder.bias)

    @property
    def dict_elements(self) -> Float[Tensor, "n_dict d_act"]:
        """The decoder's columns, scaled to unit norm."""
        return F.normalize(self.decoder.weight, dim=0).T
