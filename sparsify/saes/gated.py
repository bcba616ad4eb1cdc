"""The Gated SAE of Rajamanoharan et al. 2024 (arXiv:2404.16014).

    gate = W_enc (input - b_dec) + b_gate                          which elements are active
    magnitude = exp(r_mag) * W_enc (input - b_dec) + b_mag         how much
    c = relu(magnitude) where gate > 0, zero elsewhere
    output = D c + b_dec

The gate has no gradient from c. It is trained by the sparsity penalty, which reads relu(gate), and
by a second output, D relu(gate) + b_dec, whose decoder counts as constant: the errors of that
output are added to the loss. Locally that is the paper's auxiliary reconstruction error; end to end
it is the KL of one more spliced pass.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.saes.acts import SAEActs
from sparsify.saes.base import NewElements
from sparsify.saes.linear import LinearSAE


class GatedSAE(LinearSAE):
    """One path decides which elements are active, another how much.

    The encoder's weight and bias are those of the gate.
    """

    other_weights: tuple[float, ...] = (1.0,)

    def __init__(self, d_act: int, n_dict: int, d_out: int | None = None) -> None:
        super().__init__(d_act, n_dict, d_out)
        self.log_scale = nn.Parameter(torch.zeros(n_dict))
        self.magnitude_bias = nn.Parameter(torch.zeros(n_dict))

    def activate(
        self, pre_acts: Float[Tensor, "*sample n_dict"]
    ) -> Float[Tensor, "*sample n_dict"]:
        """The magnitudes where these, the gates, are open."""
        magnitude = (pre_acts - self.affine.bias) * self.log_scale.exp() + self.magnitude_bias
        return magnitude.relu() * (pre_acts > 0)

    def forward(self, input: Float[Tensor, "*sample d_act"]) -> SAEActs:
        """The input, its code and its reconstruction, and the gates."""
        gates = self.affine(self.centred(input))
        c = self.activate(gates)
        return self.acts_of(input, c, gates=gates.relu())

    def other_output(self, acts: SAEActs, index: int) -> Float[Tensor, "*sample d_out"]:
        """The activation that the gates stand for, with a decoder that counts as constant."""
        assert acts.gates is not None
        decoded = F.linear(acts.gates, self.used_elements.detach().T, self.decoder.bias.detach())
        return self.output_of(decoded, acts.input)

    def element_parameters(self) -> list[nn.Parameter]:
        """Parameters of every linear SAE, and the magnitudes' scales and biases."""
        return [*super().element_parameters(), self.log_scale, self.magnitude_bias]

    @torch.no_grad()
    def reset_elements(self, new: NewElements) -> None:
        """Reset elements, with magnitudes like the gates."""
        super().reset_elements(new)
        self.log_scale[new.index] = 0.0
        self.magnitude_bias[new.index] = 0.0
