"""The whole suite, and comparisons of dictionaries, as tables for the terminal."""

from collections.abc import Mapping, Sequence

import torch

from sparsify.evaluation.geometry import SAME, DictionarySimilarity
from sparsify.evaluation.suite_results import PositionSuite, Suite
from sparsify.evaluation.table import align, format_table, number, percent


def format_suite(suite: Suite) -> str:
    """The tables of `format_table`, and those of what else the suite measured."""
    return "\n".join(
        [
            format_table(suite.evaluation),
            "",
            f"KL(original || with random errors): {suite.random_error_kl:.4f} nats per token",
            f"KL of the SAEs' errors / of random ones as long: {number(suite.error_kl_ratio)}",
            "",
            *_later_lines(suite),
            *align([_SAE_HEADER, *(_sae_row(*item) for item in suite.positions.items())]),
            "",
            "elements that are active on this share of tokens",
            *align([_DENSITY_HEADER, *(_density_row(*item) for item in suite.positions.items())]),
            "",
            "MSE        of the residual stream there, with the SAEs, to the original's",
            "first      L2 ratio at the first position of a sequence; rest: at the others",
            "nearest    cosine of an element with the nearest other one, on average",
            "of alive   the same of and among elements that are active on a token or more",
        ]
    )


def _later_lines(suite: Suite) -> list[str]:
    rows = [
        [hook, f"{error.mse:.4g}", number(error.explained_variance)]
        for hook, error in suite.later.items()
    ]
    return [*align([["downstream at", "MSE", "expl. var."], *rows]), ""] if rows else []


_SAE_HEADER = ["SAE at", "first", "rest", "nearest", "of alive"]


def _sae_row(position: str, sae: PositionSuite) -> list[str]:
    means = (sae.nearest.mean().item(), sae.nearest_alive.mean().item())
    return [position, *map(number, (sae.l2_ratio_first, sae.l2_ratio_rest, *means))]


_DENSITY_BOUNDS = (1e-4, 1e-3, 1e-2, 1e-1)
_DENSITY_HEADER = ["SAE at", "none", "<0.01 %", "<0.1 %", "<1 %", "<10 %", "more"]


def _density_row(position: str, sae: PositionSuite) -> list[str]:
    bounds = torch.tensor(_DENSITY_BOUNDS, dtype=sae.densities.dtype)
    alive = sae.densities[sae.is_alive]
    counts = torch.bincount(torch.bucketize(alive, bounds, right=True), minlength=5).tolist()
    return [position, *(f"{n:,}" for n in [len(sae.densities) - len(alive), *counts])]


def format_similarities(
    names: Sequence[str], similarities: Mapping[tuple[int, int, str], DictionarySimilarity]
) -> str:
    """Pairs of dictionaries as a table, and what its columns mean.

    Args:
        names: Dictionaries that are compared.
        similarities: By the places in `names` of a and b, and the hook point.
    """
    rows = [
        row
        for (a, b, position), similarity in similarities.items()
        for row in _pair_rows(a + 1, b + 1, position, similarity)
    ]
    return "\n".join(
        [
            *(f"{index:>2}  {name}" for index, name in enumerate(names, start=1)),
            "",
            *align([["alive elements at", "of", "in", "nearest", f"> {SAME}", "matched"], *rows]),
            "",
            "nearest  cosine of an element with the nearest in the other dictionary, on average",
            f"> {SAME}    share of elements whose nearest is closer than that",
            "matched  mean cosine, if each element has a partner of its own",
        ]
    )


def _pair_rows(a: int, b: int, position: str, similarity: DictionarySimilarity) -> list[list[str]]:
    metrics = similarity.metrics()

    def row(of: int, in_: int, direction: str) -> list[str]:
        nearest = metrics[f"nearest_cosine/{direction}"]
        share = metrics[f"nearest_share_above_{SAME}/{direction}"]
        matched = number(metrics.get("matched_cosine", float("nan")))
        return [position, str(of), str(in_), number(nearest), percent(share), matched]

    return [row(a, b, "a_to_b"), row(b, a, "b_to_a")]
