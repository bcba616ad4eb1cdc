"""The ReLU SAE of Braun et al. 2024 (arXiv:2405.12241).

    c = relu(W_enc input + b_enc)
    output = D c + b_dec

where the columns of D are those of the decoder's weight, scaled to unit norm in every forward
pass. The weight itself keeps whatever norm the optimizer gives it. The input is not centred.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.kernels.sparse import decode_active, find_active
from sparsify.saes.acts import SAEActs
from sparsify.saes.base import SAE


class Decoder(nn.Module):
    """`nn.Linear(n_dict, d_act)` with an orthogonal weight, stored one dictionary element per row.

    An element so lies in one piece of memory, and a gradient can be that of some elements alone.
    In a state dict the weight is that of `nn.Linear`.
    """

    def __init__(self, d_act: int, n_dict: int) -> None:
        super().__init__()
        linear = nn.Linear(n_dict, d_act)
        nn.init.orthogonal_(linear.weight)
        self.elements = nn.Parameter(linear.weight.detach().T.contiguous())
        self.bias = linear.bias
        self.register_state_dict_post_hook(_store_columns)
        self.register_load_state_dict_pre_hook(_load_columns)

    @property
    def weight(self) -> Float[Tensor, "d_act n_dict"]:
        """The elements as columns: a view, which shares their memory."""
        return self.elements.T


def _store_columns(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: object
) -> None:  # `Any`: as torch declares it
    # Safetensors takes no tensor whose memory is in another order than its dimensions.
    weight = state_dict.pop(f"{prefix}elements").T.contiguous()
    # The bias last, as in `nn.Linear`.
    state_dict |= {f"{prefix}weight": weight, f"{prefix}bias": state_dict.pop(f"{prefix}bias")}


def _load_columns(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: object
) -> None:  # `Any`: as torch declares it
    if (weight := state_dict.pop(f"{prefix}weight", None)) is not None:
        state_dict[f"{prefix}elements"] = weight.T.contiguous()


class ReLUSAE(SAE):
    """ReLU code, unit-norm dictionary elements.

    The decoder starts with orthonormal rows (or columns, if it has fewer columns than rows), the
    encoder and both biases as any `nn.Linear` does. The names and shapes of a state dict are those
    of the original system's checkpoints.
    """

    def __init__(self, d_act: int, n_dict: int) -> None:
        super().__init__(d_act, n_dict)
        self.encoder = nn.Sequential(nn.Linear(d_act, n_dict), nn.ReLU(inplace=True))
        self.decoder = Decoder(d_act, n_dict)

    def encode(self, input: Float[Tensor, "*sample d_act"]) -> Float[Tensor, "*sample n_dict"]:
        """Non-negative activations of the dictionary elements."""
        return self.encoder(input)

    def decode(self, c: Float[Tensor, "*sample n_dict"]) -> Float[Tensor, "*sample d_act"]:
        """Sum of the dictionary elements, weighted by `c`, plus the decoder's bias."""
        # Scaling c instead of the decoder is equal, but c is the larger of the two as soon as there
        # are more samples than d_act.
        return F.linear(c, self.dict_elements.T, self.decoder.bias)

    def forward(self, input: Float[Tensor, "*sample d_act"]) -> SAEActs:
        """The input, its code and its reconstruction, computed from active elements if it pays."""
        c = self.encode(input)
        entries = find_active(c, self.d_act)
        if entries is None:
            return SAEActs(input=input, c=c, output=self.decode(c))
        encoder, decoder = self.encoder[0], self.decoder
        assert isinstance(encoder, nn.Linear)
        c, output = decode_active(
            entries,
            c,
            input,
            encoder.weight,
            encoder.bias,
            decoder.elements,
            decoder.bias,
            row_sparse_grads=self.row_sparse_grads,
        )
        return SAEActs(input=input, c=c, output=output)

    @property
    def dict_elements(self) -> Float[Tensor, "n_dict d_act"]:
        """The decoder's elements, scaled to unit norm."""
        return F.normalize(self.decoder.elements, dim=1)
