"""The BatchTopK SAE of Bussmann et al. 2024 (arXiv:2412.06410).

    c = the k * tokens largest entries of relu(W_enc (input - b_dec) + b_enc) over all tokens of the
        batch, zero elsewhere
    output = D c + b_dec

So a token gets as many elements as it needs. Outside training a token must not depend on others:
in eval mode c keeps the entries above a threshold. It has to fit the weights, which move, and one
batch is too few tokens to say where it must lie. So a training loop calls `fit` with the inputs of
many tokens before the SAE is evaluated or saved: as many of their entries are above it as active
in training. Between two fits the threshold is the smallest entry kept in the last training batch,
which leaves some per cent more or fewer elements active.

The papers and other libraries take a running mean of that smallest entry, over a hundred batches or
more. It lags behind the weights: with k 39, 18 elements were active after 200 batches.
"""

from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsify.saes.acts import SAEActs
from sparsify.saes.linear import LinearSAE

FIT_ROWS = 1024
"""Inputs whose pre-activations exist at a time while the threshold is fitted."""


def are_largest(values: Float[Tensor, "*sample n_dict"], n: int) -> Bool[Tensor, "*sample n_dict"]:
    """Mask of the n largest entries of all; among equal ones the first."""
    flat = values.detach().flatten()
    if n == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if flat.device.type != "cpu" or flat.dtype not in (torch.float32, torch.float64):
        index = flat.topk(n, sorted=False).indices
        return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, index, True).view_as(values)
    # NumPy takes 8 ms for 3 million entries, torch's topk 60.
    entries = flat.numpy()
    smallest = np.partition(entries, entries.size - n)[entries.size - n]
    are_kept = entries > smallest
    missing = n - np.count_nonzero(are_kept)
    are_kept[np.flatnonzero(entries == smallest)[:missing]] = True
    return torch.from_numpy(are_kept).view_as(values)


class BatchTopKSAE(LinearSAE):
    """Keeps the k * tokens largest pre-activations of a batch in training.

    Args:
        d_act: Width of the activation.
        n_dict: Dictionary elements.
        k: Elements active on a token, on average.
        d_out: As in `LinearSAE`.
    """

    is_fitted: ClassVar[bool] = True

    threshold: Tensor
    """Entries above it are kept in eval mode. Below zero: nothing has been learned yet."""

    def __init__(self, d_act: int, n_dict: int, k: int, d_out: int | None = None) -> None:
        super().__init__(d_act, n_dict, d_out)
        self.k = k
        self.register_buffer("threshold", torch.tensor(-1.0))

    def activate(
        self, pre_acts: Float[Tensor, "*sample n_dict"]
    ) -> Float[Tensor, "*sample n_dict"]:
        """The k * tokens largest of all in training, else those above the learned threshold."""
        if not self.training:
            return pre_acts.relu() * (pre_acts > self.threshold)
        n_tokens = pre_acts.shape[:-1].numel()
        return pre_acts.relu() * are_largest(pre_acts, self.k * n_tokens)

    @torch.no_grad()
    def learn_from(self, acts: SAEActs) -> None:
        """Set the threshold to the smallest entry of a training batch, if it has one."""
        if acts.c.numel() == 0:
            return
        smallest = acts.c.where(acts.c > 0, torch.inf).amin()
        self.threshold.copy_(torch.where(smallest.isfinite(), smallest, self.threshold))

    @torch.no_grad()
    def fit(self, inputs: Float[Tensor, "some d_act"]) -> None:
        """Set the threshold so that on average k elements are active on a token of `inputs`.

        If fewer entries are positive, all of these are.
        """
        if len(inputs) == 0:
            return
        n = self.k * len(inputs)
        largest = inputs.new_empty(0)
        smallest = inputs.new_zeros(())
        for rows in inputs.split(FIT_ROWS):
            pre_acts = self.affine(self.centred(rows))
            # Of the first rows half may be positive, of the last hardly any is above the others.
            largest = torch.cat([largest, pre_acts[pre_acts > smallest]])
            if len(largest) > n:
                # One more than are active: the threshold is the first entry that is not.
                largest = largest[are_largest(largest, n + 1)]
                smallest = largest.amin()
        self.threshold.copy_(smallest)
