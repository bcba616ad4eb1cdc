"""Numbers that an evaluation finds, each with the entry that has it measured and logged.

To add one, write its formula in `metrics.py`, a field with an entry here, and a test. `entries.py`
says which entries there are. A number that is made of others is a property, and logged by name in
`Evaluation.metrics`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from sparsify.evaluation import metrics as formulas
from sparsify.evaluation.entries import (
    PredictionMetric,
    SAEMetric,
    TokenMetric,
    logged,
    sae_mean,
)


@dataclass(frozen=True)
class PositionEvaluation:
    """Numbers of one SAE, in the spliced pass with all others, over all tokens.

    Its target is the activation in whose place it writes: what it reads, except for a transcoder.
    """

    n_dict: int
    """Dictionary elements."""

    l0: Annotated[float, SAEMetric("sparsity/eval/L_0", lambda totals: totals.firings.l0)]
    """Elements active on a token, on average."""

    n_alive: Annotated[
        int,
        SAEMetric("sparsity/alive_dict_elements", lambda totals: totals.firings.n_alive),
    ]
    """Elements that were active on at least one of the evaluation's `n_tokens`."""

    mse: Annotated[
        float,
        SAEMetric(
            "loss/eval/out_to_in",
            lambda totals: totals.sums["errors"] / totals.n_tokens / totals.d_out,
            sums=lambda at: {"errors": at.errors.sum()},
        ),
    ]
    """Squared difference of output and target, averaged over tokens and dimensions."""

    explained_variance_per_token: Annotated[
        float,
        SAEMetric(
            "loss/eval/out_to_in/explained_variance",
            lambda totals: 1 - totals.sums["unexplained"] / totals.n_tokens,
            sums=lambda at: {"unexplained": at.unexplained.sum()},
        ),
    ]
    """The original system's: mean over tokens of a ratio."""

    explained_variance_per_token_std: Annotated[
        float,
        SAEMetric(
            "loss/eval/out_to_in/explained_variance_std",
            lambda totals: formulas.standard_deviation(
                totals.sums["unexplained"], totals.sums["squares"], totals.n_tokens
            ),
            sums=lambda at: {
                "unexplained": at.unexplained.sum(),
                "squares": at.unexplained.square().sum(),
            },
        ),
    ]
    """Standard deviation of that ratio over tokens."""

    explained_variance: Annotated[
        float,
        SAEMetric(
            "loss/eval/out_to_in/explained_variance_ratio_of_sums",
            lambda totals: formulas.explained_variance(
                totals.sums["errors"], totals.sums["deviations"]
            ),
            sums=lambda at: {"errors": at.errors.sum(), "deviations": at.deviations.sum()},
        ),
    ]
    """Ratio of sums. NaN if all targets are equal."""

    l2_ratio: Annotated[
        float,
        sae_mean(
            "loss/eval/out_to_in/l2_ratio", lambda at: formulas.l2_ratio(at.output, at.target)
        ),
    ]
    """Mean over the tokens whose target is not zero; NaN if there is none."""


@dataclass(frozen=True)
class Evaluation:
    """Numbers that say how good the SAEs of a model are, on some tokens.

    Cross-entropies (`ce_*`) are nats per prediction of the next token that counts, so without a
    sequence's last token. Everything else is a mean over all tokens that count.
    """

    n_samples: int
    """Sequences."""

    n_tokens: int
    """Tokens in them that count."""

    n_predictions: int
    """Tokens that have a next one which counts too."""

    ce_loss: Annotated[float, PredictionMetric("performance/eval/ce_loss", formulas.cross_entropy)]
    """Cross-entropy with SAEs spliced in."""

    ce_loss_raw: Annotated[
        float, PredictionMetric("performance/eval/ce_loss_raw", formulas.cross_entropy, of="raw")
    ]
    """Cross-entropy of the model as it was."""

    ce_loss_zero_ablated: Annotated[
        float,
        PredictionMetric(
            "performance/eval/ce_loss_zero_ablated", formulas.cross_entropy, of="zero_ablated"
        ),
    ]
    """Cross-entropy with zeros in place of what the SAEs write, at all positions at once."""

    ce_loss_mean_ablated: Annotated[
        float,
        PredictionMetric(
            "performance/eval/ce_loss_mean_ablated", formulas.cross_entropy, of="mean_ablated"
        ),
    ]
    """Cross-entropy with the raw model's mean activation there, over all tokens evaluated."""

    top1_agreement: Annotated[
        float, TokenMetric("performance/eval/top1_agreement", formulas.top1_agreement)
    ]
    """Share of tokens after which raw and spliced model find the same token most likely."""

    logits_kl: Annotated[float, TokenMetric("loss/eval/logits_kl", formulas.kl_divergence)]
    """KL(raw || spliced) of the distributions over the next token, in nats."""

    positions: dict[str, PositionEvaluation]
    """Each SAE, by its hook point."""

    @property
    def ce_loss_increase(self) -> float:
        """Spliced minus raw cross-entropy; lower is better."""
        return self.ce_loss - self.ce_loss_raw

    @property
    def ce_recovered_zero(self) -> float:
        """Share of what zero-ablation loses that the SAEs avert: see `recovered_fraction`."""
        return formulas.recovered_fraction(
            self.ce_loss_raw, self.ce_loss, self.ce_loss_zero_ablated
        )

    @property
    def ce_recovered_mean(self) -> float:
        """Share of what mean-ablation loses that the SAEs avert: see `recovered_fraction`."""
        return formulas.recovered_fraction(
            self.ce_loss_raw, self.ce_loss, self.ce_loss_mean_ablated
        )

    def metrics(self) -> dict[str, float]:
        """All numbers by their names in the logs.

        The names that the original system has are kept: `difference_ce_loss` is raw - spliced, so
        negative when the SAEs do harm, and `explained_variance` the mean of ratios per token.
        """
        return (
            logged(self, PredictionMetric)
            | {
                "performance/eval/ce_loss_increase": self.ce_loss_increase,
                "performance/eval/difference_ce_loss": -self.ce_loss_increase,
                "performance/eval/ce_recovered_zero": self.ce_recovered_zero,
                "performance/eval/ce_recovered_mean": self.ce_recovered_mean,
            }
            | logged(self, TokenMetric)
            | {"sparsity/alive_dict_elements_n_tokens": float(self.n_tokens)}
            | {
                f"{name}/{position}": value
                for position, sae in self.positions.items()
                for name, value in logged(sae, SAEMetric).items()
            }
        )

    def to_json(self) -> dict[str, Any]:  # JSON: numbers, strings, None and dicts of them
        """Content of `eval.json`. A number that is not finite, which JSON cannot hold, is None."""
        return {
            "n_samples": self.n_samples,
            "n_tokens": self.n_tokens,
            "n_predictions": self.n_predictions,
            "n_dict": {position: sae.n_dict for position, sae in self.positions.items()},
            "metrics": finite_or_none(self.metrics()),
        }


def finite_or_none(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The numbers, with None in place of those that are not finite, which JSON cannot hold."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
