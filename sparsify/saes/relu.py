"""The ReLU SAE of Braun et al. 2024 (arXiv:2405.12241).

    c = relu(W_enc input + b_enc)
    output = D c + b_dec

where the columns of D are those of the decoder's weight, scaled to unit norm in every forward
pass. The weight itself keeps whatever norm the optimizer gives it. The input is not centred.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from sparsify.saes.linear import LinearSAE


class ReLUSAE(LinearSAE):
    """ReLU code, dictionary elements scaled to unit norm when they are used.

    The decoder starts with orthonormal rows (or columns, if it has fewer columns than rows), the
    encoder and both biases as any `nn.Linear` does. The names and shapes of a state dict are those
    of the original system's checkpoints.
    """

    is_centred: bool = False
    decoder_norm: Literal["held", "scaled", "free"] = "scaled"

    def __init__(self, d_act: int, n_dict: int, d_out: int | None = None) -> None:
        super().__init__(d_act, n_dict, d_out)
        self.encoder = nn.Sequential(self.encoder)  # for the original's name, encoder.0

    def initialise(self) -> None:
        """Leave all as it is."""

    @property
    def affine(self) -> nn.Linear:
        """The encoder's affine map."""
        assert isinstance(self.encoder, nn.Sequential)
        linear = self.encoder[0]
        assert isinstance(linear, nn.Linear)
        return linear

    def activate(
        self, pre_acts: Float[Tensor, "*sample n_dict"]
    ) -> Float[Tensor, "*sample n_dict"]:
        """Pre-activations above zero, and zeros."""
        return pre_acts.relu_()
