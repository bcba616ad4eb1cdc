"""Measures the SAEs of a model: how much the model loses with them, and how sparse they are.

The batches are read twice. Two of the numbers compare with the mean activation over all tokens: the
mean-ablated model, and the variance that an SAE explains. So a first reading collects the means; it
stops at the last SAE. The second reading makes four passes of each batch, which share everything
before the first SAE:

    tokens ─ shared prefix ─┬─ raw
                            ├─ spliced: each SAE's output in its place
                            ├─ zero-ablated: zeros there
                            └─ mean-ablated: the mean of the raw activation there

Everything is summed over tokens and divided once, so the batch size does not change the result.
Logits exist for a chunk of tokens at a time, and codes until the SAE has written its output.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparsify.evaluation.batches import (
    Batches,
    Kept,
    check_predictions,
    kept_tokens_of,
    read_batches,
)
from sparsify.evaluation.entries import (
    PredictionMetric,
    SAEMetric,
    SAETokens,
    SAETotals,
    TokenMetric,
    entries,
)
from sparsify.evaluation.forked_passes import ActSums, ForkedPasses, constant_hooks
from sparsify.evaluation.results import Evaluation, PositionEvaluation
from sparsify.kernels.chunked import fast_chunk_size
from sparsify.kernels.unembedding import Unembedding
from sparsify.losses.kept import NO_TARGET, targets_of
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.acts import SAEActs
from sparsify.saes.base import eval_mode
from sparsify.saes.firing import FiringCounter


def evaluate(
    model: SAETransformer,
    batches: Batches,
    *,
    kept: Kept | None = None,
    chunk_size: int | None = None,
) -> Evaluation:
    """Measure how good the SAEs of `model` are on some tokens, with all of them spliced in.

    Cross-entropy is that of predicting tokens 2 to n of each sequence; a prediction counts if its
    token and the next one are kept. KL, top-1 agreement and what is measured at the SAEs is over
    all kept positions, as in the original system: also the first (BOS, often an outlier) and the
    last, whose next token is unknown.

    The model is left as it was: no hook, its modules' training mode restored, no gradients.

    Args:
        model: Model and SAEs.
        batches: Token ids, of shape `batch pos`, which may differ between them, or texts, each a
            batch of one. Read twice, and must give the same sequences both times, in any batches
            and order: a list, or a loader that starts again from the same place.
        kept: Says which tokens count, a boolean for each. None: all.
        chunk_size: Tokens whose logits exist at a time. None takes as many as are fast.

    Raises:
        UserError: The model's logits are not those of its final norm and unembedding, or there are
            texts and it has no tokenizer; `batches` hold no token ids of the model, no sequence
            with a next token to predict, or one longer than the model's context; `kept` leaves no
            prediction.
        ValueError: `batches` can be read only once, or was not the same the second time.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches: a {type(batches).__name__} can be read only once, and is read twice here; "
            "give a list of batches, or a loader"
        )
    model.hooked_model.check_unembedding()
    with eval_mode(model):
        passes = ForkedPasses(model)
        means, n_tokens = _collect_means(passes, read_batches(model, batches), kept, model.device)
        measurement = _Measurement(passes, means, kept, model.device, chunk_size)
        for tokens in read_batches(model, batches):
            measurement.add(tokens)
        if measurement.n_tokens != n_tokens:
            raise ValueError(
                f"batches: gave {n_tokens} tokens when first read, and {measurement.n_tokens} when "
                "read again; give a list of batches"
            )
        return measurement.result()


class _Means:
    """Mean activations where SAEs write: of the raw model, and of the spliced one before that."""

    def __init__(self, raw: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        self.raw = raw
        self.target = target
        self.zeros = {position: torch.zeros_like(mean) for position, mean in raw.items()}


def _collect_means(
    passes: ForkedPasses,
    batches: Iterable[Int[Tensor, "_ _"]],
    kept: Kept | None,
    device: torch.device,
) -> tuple[_Means, int]:
    """Return the means over all tokens that count, and their number."""
    raw, target = ActSums(), ActSums()
    n_read = n_tokens = n_predictions = 0
    for tokens in batches:
        counts = kept_tokens_of(kept, tokens)
        n_read += tokens.numel()
        n_tokens += tokens.numel() if counts is None else int(counts.sum())
        n_predictions += n_counted(targets_of(tokens, counts))
        with torch.no_grad():
            prefix = passes.shared_prefix(tokens)
            passes.suffix(prefix, raw.hooks(passes.positions, counts), passes.last_sae_stop)
            if len(passes.positions) > 1:  # a single SAE reads the raw activation
                add = partial(_add_target, target, counts)
                passes.suffix(prefix, passes.splice_hooks(add), passes.last_sae_stop)
    check_predictions(n_read, n_predictions)
    raw_means = raw.means(n_tokens, device)
    return _Means(raw_means, target.means(n_tokens, device) or raw_means), n_tokens


def _add_target(sums: ActSums, counts: Tensor | None, position: str, acts: SAEActs) -> None:
    sums.add(position, acts.target, counts)


class _Measurement:
    """Sums of the second reading."""

    def __init__(
        self,
        passes: ForkedPasses,
        means: _Means,
        kept: Kept | None,
        device: torch.device,
        chunk_size: int | None,
    ) -> None:
        self.passes = passes
        self.means = means
        self.kept = kept
        self.device = device
        self.chunk_size = chunk_size
        self.n_samples = self.n_tokens = self.n_predictions = 0
        self.firings = {
            position: FiringCounter(passes.saes.at(position).n_dict, device)
            for position in passes.positions
        }
        self.of_predictions = entries(Evaluation, PredictionMetric)
        self.of_tokens = entries(Evaluation, TokenMetric)
        self.of_saes = entries(PositionEvaluation, SAEMetric)
        # By metric, position ("" for what is measured of the whole model), and name of a sum.
        self.sums: dict[tuple[str, str, str], float] = defaultdict(float)

    def add(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Measure a batch."""
        sums: dict[tuple[str, str, str], Tensor] = {}
        kept = kept_tokens_of(self.kept, tokens)
        targets = targets_of(tokens, kept)

        def observe(position: str, acts: SAEActs) -> None:
            acts = acts if kept is None else acts.only(kept)
            self.firings[position].update(acts.c)
            mean_target = self.means.target[position]
            at = SAETokens(acts.c, acts.target.float(), acts.output.float(), mean_target)
            for metric in self.of_saes.values():
                for name, value in metric.sums(at).items():
                    sums[metric.name, position, name] = value

        with torch.no_grad():
            prefix = self.passes.shared_prefix(tokens)
            resids = {
                "raw": self.passes.suffix(prefix, {}),
                "spliced": self.passes.suffix(prefix, self.passes.splice_hooks(observe)),
                "zero_ablated": self.passes.suffix(prefix, constant_hooks(self.means.zeros)),
                "mean_ablated": self.passes.suffix(prefix, constant_hooks(self.means.raw)),
            }
            of_logits = [*self.of_predictions.values(), *self.of_tokens.values()]
            unembed = self.passes.model.unembed
            found = prediction_sums(of_logits, resids, targets, unembed, self.chunk_size, kept)
            sums |= {(name, "", ""): value for name, value in found.items()}
            # One transfer from the device for all.
            values = torch.stack([value.float() for value in sums.values()]).tolist()
        for key, value in zip(sums, values, strict=True):
            self.sums[key] += value
        self.n_samples += len(tokens)
        self.n_tokens += tokens.numel() if kept is None else int(kept.sum())
        self.n_predictions += n_counted(targets)

    def result(self) -> Evaluation:
        """Numbers over all batches."""
        means = {
            field: self.sums[metric.name, "", ""] / self.n_predictions
            for field, metric in self.of_predictions.items()
        } | {
            field: self.sums[metric.name, "", ""] / self.n_tokens
            for field, metric in self.of_tokens.items()
        }
        return Evaluation(
            n_samples=self.n_samples,
            n_tokens=self.n_tokens,
            n_predictions=self.n_predictions,
            positions={position: self._at(position) for position in self.passes.positions},
            **means,
        )

    def _at(self, position: str) -> PositionEvaluation:
        sae = self.passes.saes.at(position)
        numbers: dict[str, Any] = {  # of the type that the field has
            field: metric.value(
                SAETotals(
                    sums=self._sums_of(metric.name, position),
                    n_tokens=self.n_tokens,
                    d_out=sae.d_out,
                    firings=self.firings[position],
                )
            )
            for field, metric in self.of_saes.items()
        }
        return PositionEvaluation(n_dict=sae.n_dict, **numbers)

    def _sums_of(self, metric: str, position: str) -> dict[str, float]:
        return {key[2]: value for key, value in self.sums.items() if key[:2] == (metric, position)}


def n_counted(targets: Int[Tensor, "batch pos"]) -> int:
    """Number of predictions that count."""
    return int((targets != NO_TARGET).sum())


def prediction_sums(
    metrics: Sequence[PredictionMetric | TokenMetric],
    resids: Mapping[str, Float[Tensor, "batch pos d_model"]],
    targets: Int[Tensor, "batch pos"],
    unembed: Unembedding,
    chunk_size: int | None,
    kept: Bool[Tensor, "batch pos"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Sums over tokens of metrics of the logits, of which a chunk exists at a time.

    Args:
        metrics: Their `of` is a name in `resids`.
        resids: Final residual streams of each pass, `raw` among them.
        targets: From `targets_of`: the token after each, where the prediction counts.
        unembed: Final norm and unembedding.
        chunk_size: Tokens in a chunk. None takes as many as are fast.
        kept: Tokens that count. None: all.

    Returns:
        The sum of each metric, by its name.
    """
    targets = targets.flatten()
    rows = {name: resid.flatten(end_dim=-2) for name, resid in resids.items()}
    if kept is not None:
        targets = targets[kept.flatten()]
        rows = {name: resid[kept.flatten()] for name, resid in rows.items()}
    size = chunk_size or fast_chunk_size(unembed)
    sums = defaultdict(lambda: torch.zeros((), device=targets.device))
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        log_raw = _log_probs(rows["raw"][part], unembed)
        for name in rows:
            log_probs = log_raw if name == "raw" else _log_probs(rows[name][part], unembed)
            for metric in metrics:
                if metric.of == name:
                    sums[metric.name] += metric.values(log_raw, log_probs, targets[part]).sum()
    return dict(sums)


def _log_probs(resid: Tensor, unembed: Unembedding) -> Tensor:
    logits = unembed(resid)
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
