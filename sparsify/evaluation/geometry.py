"""Similarity of dictionary elements, within one dictionary and between two.

Elements are what an SAE writes: rows of `dict_elements`. Only their directions count. Those that
never fire are mostly where they were initialised, so give the rows of the alive ones.

Dimensions: `n_dict` is the number of elements, `d_out` the width of the activation they write.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from sparsify.evaluation.histogram import cosine_histogram
from sparsify.evaluation.results import finite_or_none

SAME = 0.9
"""Above this cosine two elements are taken for the same."""
MAX_MATCHED = 20_000
"""All cosines of two such dictionaries take 1.6 GB, and the assignment copies them in 3.2 GB."""


@torch.no_grad()
def nearest_cosine(
    elements: Float[Tensor, "n_dict d_out"],
    others: Float[Tensor, "n_others d_out"] | None = None,
    chunk_size: int = 1024,
) -> Float[Tensor, " n_dict"]:
    """Cosine of each element with the nearest of the others.

    Between -1 and 1; within one dictionary, high means that elements repeat each other (Braun et
    al. 2024, arXiv:2405.12241). NaN where there is no other.

    Args:
        elements: One direction per row.
        others: Where the nearest is looked for. None: among `elements`, but not the element itself.
        chunk_size: Elements whose cosines with all others exist at a time.
    """
    directions = F.normalize(elements, dim=1)
    candidates = directions if others is None else F.normalize(others, dim=1)
    nearest = directions.new_full((len(directions),), math.nan)
    if len(candidates) == 0 or (others is None and len(candidates) == 1):
        return nearest
    for start in range(0, len(directions), chunk_size):
        cosines = directions[start : start + chunk_size] @ candidates.T
        if others is None:
            cosines.diagonal(start).fill_(-math.inf)
        nearest[start : start + chunk_size] = cosines.amax(dim=1)
    return nearest.clamp_(-1, 1)  # rounding leads beyond


def matched_cosine(
    a: Float[Tensor, "n_dict_a d_out"], b: Float[Tensor, "n_dict_b d_out"]
) -> Float[Tensor, " pair"]:
    """The cosine of each pair, if elements are matched one to one so that the sum is largest.

    Of the larger dictionary some elements stay alone. Unlike in `nearest_cosine`, no element of one
    can stand for several of the other: the matching of Paulo & Belrose 2025 (arXiv:2501.16615). It
    holds all cosines in memory, and takes a time that grows with up to the third power.
    """
    cosines = (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).clamp_(-1, 1).cpu()
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    return cosines[torch.from_numpy(rows), torch.from_numpy(columns)]


@dataclass(frozen=True)
class DictionarySimilarity:
    """Similarity of two dictionaries, a and b."""

    a_to_b: Float[Tensor, " n_dict_a"]
    """Cosine of each element of a with the nearest of b."""

    b_to_a: Float[Tensor, " n_dict_b"]
    """Cosine of each element of b with the nearest of a."""

    matched: Float[Tensor, " pair"] | None
    """Cosines of the one-to-one matching. None: a dictionary has more than `MAX_MATCHED`."""

    def metrics(self) -> dict[str, float]:
        """Mean cosines, and shares of elements or pairs above `SAME`; NaN if there are none."""
        parts = {"nearest_cosine/a_to_b": self.a_to_b, "nearest_cosine/b_to_a": self.b_to_a}
        if self.matched is not None:
            parts["matched_cosine"] = self.matched
        means = {name: cosines.mean().item() for name, cosines in parts.items()}
        shares = {
            name.replace("cosine", f"share_above_{SAME}"): (cosines > SAME).float().mean().item()
            for name, cosines in parts.items()
        }
        return means | shares

    def to_json(self) -> dict[str, Any]:  # JSON: numbers, None, and lists and dicts of them
        """All numbers, and histograms of the nearest cosines."""
        return {
            "n_elements_a": len(self.a_to_b),
            "n_elements_b": len(self.b_to_a),
            "metrics": finite_or_none(self.metrics()),
            "histograms": {
                "nearest_cosine/a_to_b": cosine_histogram(self.a_to_b).to_json(),
                "nearest_cosine/b_to_a": cosine_histogram(self.b_to_a).to_json(),
            },
        }


@torch.no_grad()
def compare_dictionaries(
    a: Float[Tensor, "n_dict_a d_out"], b: Float[Tensor, "n_dict_b d_out"]
) -> DictionarySimilarity:
    """Compare two dictionaries of one hook point: of two seeds, or two kinds of training."""
    is_small = max(len(a), len(b)) <= MAX_MATCHED
    return DictionarySimilarity(
        a_to_b=nearest_cosine(a, b),
        b_to_a=nearest_cosine(b, a),
        matched=matched_cosine(a, b) if is_small else None,
    )
