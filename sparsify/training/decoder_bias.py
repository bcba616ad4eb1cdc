"""The decoder's bias from data, so that what is encoded is centred from the start."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.saes.base import SAE
from sparsify.saes.linear import LinearSAE

MAX_STEPS = 100
TOLERANCE = 1e-6


def geometric_median(rows: Float[Tensor, "row d_act"]) -> Float[Tensor, " d_act"]:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration.

    Unlike the mean it is hardly moved by a few rows that lie far away. In float64; it stops when it
    moves by less than a millionth of the rows' mean distance, or after 100 steps.
    """
    points = rows.cpu().double()  # which some accelerators do not have
    median = points.mean(dim=0)
    for _ in range(MAX_STEPS):
        distances = torch.linalg.vector_norm(points - median, dim=1)
        weights = 1 / distances.clamp(min=1e-12)
        moved = (weights[:, None] * points).sum(dim=0) / weights.sum()
        is_close = torch.linalg.vector_norm(moved - median) <= TOLERANCE * distances.mean()
        median = moved
        if is_close:
            break
    return median.to(rows)


@torch.no_grad()
def set_decoder_bias(
    sae: SAE, targets: Float[Tensor, "*sample d_out"], how: Literal["mean", "geometric_median"]
) -> None:
    """Set the decoder's bias to the middle of what the SAE is to write."""
    assert isinstance(sae, LinearSAE), "a config with another kind is refused"
    rows = targets.flatten(end_dim=-2).float()
    middle = rows.mean(dim=0) if how == "mean" else geometric_median(rows)
    sae.decoder.bias.copy_(middle)
