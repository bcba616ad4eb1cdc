"""The TopK SAE of Gao et al. 2024 (arXiv:2406.04093).

    c = the k largest entries of relu(W_enc (input - b_dec) + b_enc), zero elsewhere
    output = D c + b_dec

Multi-TopK trains the code of `multi_k` entries too, with an eighth of the weight.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.saes.acts import SAEActs
from sparsify.saes.linear import LinearSAE

MULTI_WEIGHT = 1 / 8


def keep_largest(
    pre_acts: Float[Tensor, "*sample n_dict"], k: int
) -> Float[Tensor, "*sample n_dict"]:
    """The k largest entries of each sample where they are positive, and zero elsewhere."""
    values, index = pre_acts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_acts).scatter(-1, index, values.relu())


class TopKSAE(LinearSAE):
    """Keeps the k largest pre-activations of each token.

    Args:
        d_act: Width of the activation.
        n_dict: Dictionary elements.
        k: Elements active on a token.
        multi_k: Elements in the other code that is trained. None: there is none.
        d_out: As in `LinearSAE`.
    """

    def __init__(
        self,
        d_act: int,
        n_dict: int,
        k: int,
        multi_k: int | None = None,
        *,
        d_out: int | None = None,
    ) -> None:
        super().__init__(d_act, n_dict, d_out)
        self.k = k
        self.multi_k = multi_k
        self.keeps_pre_acts = multi_k is not None
        self.other_weights = () if multi_k is None else (MULTI_WEIGHT,)

    def activate(
        self, pre_acts: Float[Tensor, "*sample n_dict"]
    ) -> Float[Tensor, "*sample n_dict"]:
        """The k largest pre-activations, and zeros."""
        return keep_largest(pre_acts, self.k)

    def other_output(self, acts: SAEActs, index: int) -> Float[Tensor, "*sample d_out"]:
        """The activation that the `multi_k` largest entries stand for."""
        assert acts.pre_acts is not None
        assert self.multi_k is not None
        return self.output_of(self.decode(keep_largest(acts.pre_acts, self.multi_k)), acts.input)
