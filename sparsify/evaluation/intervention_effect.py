"""Measures what interventions do to a model's predictions.

Each batch is read once, for three passes that share everything before the first SAE:

    tokens ─ shared prefix ─┬─ raw
                            ├─ spliced: each SAE's output, or output + error, in its place
                            └─ intervened: the same with the interventions
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsify.evaluation.batches import (
    Batches,
    Kept,
    check_predictions,
    kept_tokens_of,
    read_batches,
)
from sparsify.evaluation.entries import PredictionMetric, TokenMetric
from sparsify.evaluation.evaluate import n_counted, prediction_sums
from sparsify.evaluation.forked_passes import ForkedPasses
from sparsify.evaluation.metrics import cross_entropy, kl_divergence
from sparsify.losses.kept import targets_of
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.base import eval_mode
from sparsify.settings.base_config import UserError
from sparsify.splicing.interventions import Intervention

_OF_PAIR = (
    PredictionMetric("ce_raw", cross_entropy, of="raw"),
    PredictionMetric("ce_spliced", cross_entropy),
    TokenMetric("kl", kl_divergence),
)


@dataclass(frozen=True)
class InterventionEffect:
    """Effect of interventions on some tokens, with all SAEs of a model spliced in.

    Cross-entropies are nats per prediction of the next token, so without a sequence's last token,
    and without those of which a token is left out. Divergences are nats per token, over all tokens
    that count. That includes tokens before the first intervention, on which nothing changes.
    """

    n_tokens: int
    """Tokens that count."""

    n_predictions: int
    """Tokens that have a next one which counts too."""

    ce_loss_raw: float
    """Cross-entropy of the model as it was."""

    ce_loss: float
    """Cross-entropy with SAEs; that of the raw model if their errors are added."""

    ce_loss_intervened: float
    """Cross-entropy with the interventions too."""

    kl: float
    """KL(spliced || intervened): what the interventions change."""

    kl_raw: float
    """KL(raw || intervened): that and what the SAEs change."""

    @property
    def ce_loss_increase(self) -> float:
        """Cross-entropy with interventions, minus that without: above zero if they do harm."""
        return self.ce_loss_intervened - self.ce_loss


def intervention_effect(
    model: SAETransformer,
    batches: Batches,
    interventions: Sequence[Intervention] | Intervention,
    *,
    add_error: bool = False,
    kept: Kept | None = None,
    chunk_size: int | None = None,
) -> InterventionEffect:
    """Measure what interventions do to cross-entropy and distributions over the next token.

    The model is left as it was, as by `evaluate`.

    Args:
        model: Model and SAEs, which all take part.
        batches: Token ids, of shape `batch pos`, or texts, each a batch of one. Read once.
        interventions: Done to each sequence; their tokens are places in it.
        add_error: Whether what SAEs do not reconstruct is added, in both passes with SAEs. The
            interventions then act on the model as it was.
        kept: Says which tokens count, a boolean for each. None: all.
        chunk_size: Tokens whose logits exist at a time. None takes as many as are fast.

    Raises:
        UserError: There are no interventions, or they do not fit the SAEs or a sequence, or there
            are texts and the model has no tokenizer; `batches` hold no token ids of the model, no
            sequence with a next token to predict, or one longer than the model's context; `kept`
            leaves no prediction.
    """
    if not isinstance(interventions, Intervention) and not interventions:
        raise UserError("interventions: there are none; give at least one")
    passes = ForkedPasses(model)
    passes.model.check_unembedding()
    sums: dict[str, float] = defaultdict(float)
    with eval_mode(model), torch.no_grad():
        for tokens in read_batches(model, batches):
            sums["n_read"] += tokens.numel()
            counts = kept_tokens_of(kept, tokens)
            if counts is None:
                counts = torch.ones_like(tokens, dtype=torch.bool)
            if not counts.any():
                continue
            targets = targets_of(tokens, counts)
            resids = _final_resids(model, passes, tokens, interventions, add_error)
            for name in ("raw", "spliced"):
                pair = {"raw": resids[name], "spliced": resids["intervened"]}
                of_pair = prediction_sums(
                    _OF_PAIR, pair, targets, passes.model.unembed, chunk_size, counts
                )
                sums[f"ce_{name}"] += of_pair["ce_raw"].item()
                sums[f"kl_{name}"] += of_pair["kl"].item()
            sums["ce_intervened"] += of_pair["ce_spliced"].item()
            sums["n_tokens"] += int(counts.sum())
            sums["n_predictions"] += n_counted(targets)
    return _effect(sums)


def _final_resids(
    model: SAETransformer,
    passes: ForkedPasses,
    tokens: Int[Tensor, "batch pos"],
    interventions: Sequence[Intervention] | Intervention,
    add_error: bool,
) -> dict[str, Float[Tensor, "batch pos d_model"]]:
    prefix = passes.shared_prefix(tokens)

    def spliced(changes: Sequence[Intervention] | Intervention) -> Tensor:
        edit = model.edit(passes.positions, changes, add_error)
        return passes.suffix(prefix, passes.splice_hooks(lambda position, acts: None, edit=edit))

    return {
        "raw": passes.suffix(prefix, {}),
        "spliced": spliced(()),
        "intervened": spliced(interventions),
    }


def _effect(sums: Mapping[str, float]) -> InterventionEffect:
    n_tokens, n_predictions = int(sums["n_tokens"]), int(sums["n_predictions"])
    check_predictions(int(sums["n_read"]), n_predictions)
    return InterventionEffect(
        n_tokens=n_tokens,
        n_predictions=n_predictions,
        ce_loss_raw=sums["ce_raw"] / n_predictions,
        ce_loss=sums["ce_spliced"] / n_predictions,
        ce_loss_intervened=sums["ce_intervened"] / n_predictions,
        kl=sums["kl_spliced"] / n_tokens,
        kl_raw=sums["kl_raw"] / n_tokens,
    )
