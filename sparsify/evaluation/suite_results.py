"""Numbers that the whole suite finds, under the names of the logs and of `evaluation.json`."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsify.evaluation.histogram import Histogram, cosine_histogram, histogram
from sparsify.evaluation.results import Evaluation, finite_or_none


@dataclass(frozen=True)
class LaterError:
    """Distance of the spliced model's residual stream from the raw one's, behind the SAEs."""

    mse: float
    """Squared difference of spliced and raw activation, averaged over tokens and dimensions. Where
    an SAE sits, that of what it stands in for."""

    explained_variance: float
    """1 - sum of squared differences / sum of squared distances of the raw activation to its mean.
    NaN if all raw activations are equal."""


@dataclass(frozen=True)
class PositionSuite:
    """Numbers of one SAE, in addition to those of `PositionEvaluation`."""

    l2_ratio_first: float
    """||output|| / ||target|| at the first position of a sequence, averaged over sequences. NaN if
    none of these tokens counts."""

    l2_ratio_rest: float
    """That ratio at all other positions, averaged over tokens."""

    densities: Float[Tensor, " n_dict"]
    """Share of tokens on which each element is active. 0: it is dead."""

    nearest: Float[Tensor, " n_dict"]
    """Cosine of each element with the nearest other one. NaN if there is no other."""

    nearest_alive: Float[Tensor, " n_alive"]
    """That cosine of and among the alive elements."""

    @property
    def is_alive(self) -> Bool[Tensor, " n_dict"]:
        """True for elements that were active on a token or more."""
        return self.densities > 0

    @property
    def density_histogram(self) -> Histogram:
        """log10 of the densities of alive elements, in quarters of a power of ten from 1e-8 on."""
        return histogram(self.densities[self.is_alive].log10(), -8.0, 0.0, bins_per_unit=4)


@dataclass(frozen=True)
class Suite:
    """Everything that is measured of the SAEs of a model, on some tokens."""

    evaluation: Evaluation
    """Numbers that `evaluate` found."""

    later: dict[str, LaterError]
    """By hook point: before each block behind the first SAE, and after the last block."""

    positions: dict[str, PositionSuite]
    """Each SAE, by its hook point."""

    random_error_kl: float
    """KL(raw || with random errors) of the distributions over the next token, in nats. Each is as
    long as the SAE's own error on that token, and added to the raw activation."""

    @property
    def error_kl_ratio(self) -> float:
        """KL that the SAEs' errors cost, relative to that of random ones of the same norm.

        NaN if random ones cost nothing. For SAEs that were trained locally Gurnee 2024 ("SAE
        reconstruction errors are (empirically) pathological") found 2 to 4.5 in GPT-2.
        """
        if self.random_error_kl <= 0:
            return math.nan
        return self.evaluation.logits_kl / self.random_error_kl

    def metrics(self) -> dict[str, float]:
        """All numbers by their names in the logs, those of `evaluate` among them."""
        metrics = self.evaluation.metrics()
        metrics["performance/eval/random_error_kl"] = self.random_error_kl
        metrics["performance/eval/error_kl_ratio"] = self.error_kl_ratio
        for hook, error in self.later.items():
            metrics[f"loss/eval/in_to_orig/{hook}"] = error.mse
            metrics[f"loss/eval/in_to_orig/explained_variance/{hook}"] = error.explained_variance
        for position, sae in self.positions.items():
            metrics |= {
                f"loss/eval/out_to_in/l2_ratio_first/{position}": sae.l2_ratio_first,
                f"loss/eval/out_to_in/l2_ratio_rest/{position}": sae.l2_ratio_rest,
                f"dictionary/nearest_cosine/{position}": sae.nearest.mean().item(),
                f"dictionary/nearest_cosine_alive/{position}": sae.nearest_alive.mean().item(),
            }
        return metrics

    def to_json(self) -> dict[str, Any]:  # JSON: numbers, None, and lists and dicts of them
        """Content of `evaluation.json`: that of `eval.json`, with more metrics and histograms."""
        histograms: dict[str, Any] = {}
        for position, sae in self.positions.items():
            n_dead = int(torch.count_nonzero(~sae.is_alive))
            histograms |= {
                f"log10_density/{position}": sae.density_histogram.to_json() | {"n_dead": n_dead},
                f"nearest_cosine/{position}": cosine_histogram(sae.nearest).to_json(),
                f"nearest_cosine_alive/{position}": cosine_histogram(sae.nearest_alive).to_json(),
            }
        metrics = finite_or_none(self.metrics())
        return self.evaluation.to_json() | {"metrics": metrics, "histograms": histograms}
