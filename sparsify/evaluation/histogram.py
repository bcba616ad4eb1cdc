"""Counts of values in bins of equal width."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Histogram:
    """Numbers of values in bins."""

    edges: list[float]
    """Bounds of the bins, one more than there are bins."""

    counts: list[int]
    """Values from each bound up to, but without, the next."""

    def to_json(self) -> dict[str, Any]:  # JSON: lists of numbers
        """Edges and counts."""
        return {"edges": self.edges, "counts": self.counts}


def histogram(
    values: Float[Tensor, " value"], low: float, high: float, bins_per_unit: int
) -> Histogram:
    """A histogram from `low` to `high`, of which the outermost bins take what lies beyond."""
    n_bins = round((high - low) * bins_per_unit)
    edges = [(low * bins_per_unit + index) / bins_per_unit for index in range(n_bins + 1)]
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    index = torch.bucketize(values.cpu().double(), inner, right=True)
    return Histogram(edges, torch.bincount(index, minlength=n_bins).tolist())


def cosine_histogram(cosines: Float[Tensor, " n_dict"]) -> Histogram:
    """Cosines from -1 to 1 in bins of 0.05; those that are NaN are left out."""
    return histogram(cosines[~cosines.isnan()], -1.0, 1.0, bins_per_unit=20)
