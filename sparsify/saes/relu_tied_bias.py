"""The ReLU SAE of Bricken et al. 2023 (https://transformer-circuits.pub/2023/monosemantic-features).

    c = relu(W_enc (input - b_dec) + b_enc)
    output = D c + b_dec

The decoder's bias is subtracted first, and elements are held at unit norm.
"""

from jaxtyping import Float
from torch import Tensor

from sparsify.saes.linear import LinearSAE


class ReLUTiedBiasSAE(LinearSAE):
    """ReLU code, bias tied, elements held at unit norm."""

    def activate(
        self, pre_acts: Float[Tensor, "*sample n_dict"]
    ) -> Float[Tensor, "*sample n_dict"]:
        """Pre-activations above zero, and zeros."""
        return pre_acts.relu_()
