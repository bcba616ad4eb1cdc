"""The GroupMax SAE of EleutherAI's sparsify (https://github.com/EleutherAI/sparsify).

    c = the largest entry of each group of relu(W_enc (input - b_dec) + b_enc), zero elsewhere
    output = D c + b_dec

The groups are k stretches of n_dict / k elements, in their order. Unlike the k largest of all, they
need no search over the whole dictionary.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.saes.linear import LinearSAE


class GroupMaxSAE(LinearSAE):
    """Keeps the largest pre-activation of each group, where it is positive.

    Args:
        d_act: Width of the activation.
        n_dict: Dictionary elements, a multiple of k.
        k: Groups.
        d_out: As in `LinearSAE`.
    """

    def __init__(self, d_act: int, n_dict: int, k: int, d_out: int | None = None) -> None:
        super().__init__(d_act, n_dict, d_out)
        self.k = k

    def activate(
        self, pre_acts: Float[Tensor, "*sample n_dict"]
    ) -> Float[Tensor, "*sample n_dict"]:
        """The largest pre-activation of each group, and zeros."""
        groups = pre_acts.unflatten(-1, (self.k, -1))
        values, index = groups.max(dim=-1, keepdim=True)
        kept = torch.zeros_like(groups).scatter(-1, index, values.relu())
        return kept.flatten(start_dim=-2)
