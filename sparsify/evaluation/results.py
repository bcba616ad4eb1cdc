"""What an evaluation found, under the names of the logs and of `eval.json`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.evaluation.metrics import recovered_fraction


@dataclass(frozen=True)
class PositionEvaluation:
    """One SAE, in the spliced pass with all others. Over all tokens; see `metrics` for formulas.

    Its target is the activation in whose place it writes: what it reads, but for a transcoder.
    """

    n_dict: int
    """Dictionary elements."""

    l0: float
    """Elements active on a token, on average."""

    n_alive: int
    """Elements that were active on at least one of the evaluation's `n_tokens`."""

    mse: float
    """Squared difference of output and target, averaged over tokens and dimensions."""

    explained_variance: float
    """Ratio of sums. NaN if all targets are equal."""

    explained_variance_per_token: float
    """The original system's: mean over tokens of a ratio."""

    explained_variance_per_token_std: float
    """Standard deviation of that ratio over tokens."""

    l2_ratio: float
    """Mean over the tokens whose target is not zero; NaN if there is none."""


@dataclass(frozen=True)
class Evaluation:
    """How good the SAEs of a model are, on some tokens.

    Cross-entropies (`ce_*`) are nats per prediction of the next token, so without a sequence's last
    token. Everything else is a mean over all tokens.
    """

    n_samples: int
    """Sequences."""

    n_tokens: int
    """Tokens in them."""

    n_predictions: int
    """Tokens that have a next one."""

    ce_loss_raw: float
    """Cross-entropy of the model as it was."""

    ce_loss: float
    """Cross-entropy with SAEs spliced in."""

    ce_loss_zero_ablated: float
    """Cross-entropy with zeros in place of what the SAEs write, at all positions at once."""

    ce_loss_mean_ablated: float
    """The same with the raw model's activation, averaged over all tokens evaluated."""

    logits_kl: float
    """KL(raw || spliced) of the distributions over the next token, in nats."""

    top1_agreement: float
    """Share of tokens after which raw and spliced model find the same token most likely."""

    positions: dict[str, PositionEvaluation]
    """Each SAE, by its hook point."""

    @property
    def ce_loss_increase(self) -> float:
        """Spliced minus raw cross-entropy; lower is better."""
        return self.ce_loss - self.ce_loss_raw

    @property
    def ce_recovered_zero(self) -> float:
        """Share of what zero-ablation loses that the SAEs avert: see `recovered_fraction`."""
        return recovered_fraction(self.ce_loss_raw, self.ce_loss, self.ce_loss_zero_ablated)

    @property
    def ce_recovered_mean(self) -> float:
        """Share of what mean-ablation loses that the SAEs avert: see `recovered_fraction`."""
        return recovered_fraction(self.ce_loss_raw, self.ce_loss, self.ce_loss_mean_ablated)

    def metrics(self) -> dict[str, float]:
        """All numbers by their names in the logs.

        The names that the original system has are kept: `difference_ce_loss` is raw - spliced, so
        negative when the SAEs do harm, and `explained_variance` the mean of ratios per token.
        """
        performance = {
            "ce_loss": self.ce_loss,
            "ce_loss_raw": self.ce_loss_raw,
            "ce_loss_zero_ablated": self.ce_loss_zero_ablated,
            "ce_loss_mean_ablated": self.ce_loss_mean_ablated,
            "ce_loss_increase": self.ce_loss_increase,
            "difference_ce_loss": -self.ce_loss_increase,
            "ce_recovered_zero": self.ce_recovered_zero,
            "ce_recovered_mean": self.ce_recovered_mean,
            "top1_agreement": self.top1_agreement,
        }
        metrics = {f"performance/eval/{name}": value for name, value in performance.items()}
        metrics["loss/eval/logits_kl"] = self.logits_kl
        metrics["sparsity/alive_dict_elements_n_tokens"] = float(self.n_tokens)
        for position, sae in self.positions.items():
            error = "loss/eval/out_to_in"
            metrics |= {
                f"sparsity/eval/L_0/{position}": sae.l0,
                f"sparsity/alive_dict_elements/{position}": float(sae.n_alive),
                f"{error}/{position}": sae.mse,
                f"{error}/explained_variance/{position}": sae.explained_variance_per_token,
                f"{error}/explained_variance_std/{position}": sae.explained_variance_per_token_std,
                f"{error}/explained_variance_ratio_of_sums/{position}": sae.explained_variance,
                f"{error}/l2_ratio/{position}": sae.l2_ratio,
            }
        return metrics

    def to_json(self) -> dict[str, Any]:  # JSON: numbers, strings, None and dicts of them
        """What `eval.json` holds. A number that is not finite, which JSON cannot hold, is None."""
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
