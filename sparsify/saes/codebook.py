"""The codebook of Tamkin et al. 2023 (arXiv:2310.17230).

    c = 1 for the k codes of largest cosine similarity with the input, zero elsewhere
    output = sum over j of c_j code_j

The choice has no gradient. The codes that were chosen get that of the output, and so does, straight
through, the input: an SAE before this one.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.saes.acts import SAEActs
from sparsify.saes.base import SAE, NewElements


class CodebookSAE(SAE):
    """The sum of the k most similar codes.

    Codes start as normal vectors whose sum has about the length 1.

    Args:
        d_act: Width of the activation.
        n_dict: Codes.
        k: Codes that are added for a token.
    """

    def __init__(self, d_act: int, n_dict: int, k: int) -> None:
        super().__init__(d_act, n_dict)
        self.k = k
        self.codes = nn.Parameter(torch.randn(n_dict, d_act) / (k * d_act) ** 0.5)

    def choose(self, input: Float[Tensor, "*sample d_act"]) -> Int[Tensor, "*sample k"]:
        """The codes that are most similar to each input."""
        with torch.no_grad():  # the length of the input does not change the order
            return F.linear(input, self.dict_elements).topk(self.k, dim=-1, sorted=False).indices

    def encode(self, input: Float[Tensor, "*sample d_act"]) -> Float[Tensor, "*sample n_dict"]:
        """1 for the chosen codes."""
        return self._code_of(self.choose(input), input)

    def _code_of(self, index: Tensor, input: Tensor) -> Tensor:
        return input.new_zeros(*input.shape[:-1], self.n_dict).scatter_(-1, index, 1.0)

    def decode(self, c: Float[Tensor, "*sample n_dict"]) -> Float[Tensor, "*sample d_act"]:
        """Sum of the codes, weighted by `c`."""
        return F.linear(c, self.codes.T)

    def forward(self, input: Float[Tensor, "*sample d_act"]) -> SAEActs:
        """The input, its code and the sum of the chosen codes."""
        index = self.choose(input)
        c = self._code_of(index, input)
        chosen = F.embedding_bag(index.reshape(-1, self.k), self.codes, mode="sum")
        output = chosen.view_as(input) + (input - input.detach())
        return SAEActs(input=input, c=c, output=output)

    @property
    def dict_elements(self) -> Float[Tensor, "n_dict d_act"]:
        """The codes, scaled to unit norm."""
        return F.normalize(self.codes, dim=1)

    def element_parameters(self) -> list[nn.Parameter]:
        """The codes."""
        return [self.codes]

    @torch.no_grad()
    def reset_elements(self, new: NewElements) -> None:
        """Reset codes to the directions of their targets, as long as the others on average."""
        others = torch.ones(self.n_dict, dtype=torch.bool, device=new.index.device)
        others[new.index] = False
        kept = self.codes[others] if others.any() else self.codes
        self.codes[new.index] = F.normalize(new.targets, dim=1) * kept.norm(dim=1).mean()
