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
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparsify.evaluation.forked_passes import ActSums, ForkedPasses, constant_hooks
from sparsify.evaluation.metrics import (
    cross_entropy,
    explained_variance,
    kl_divergence,
    l2_ratio,
    squared_distance,
    top1_agreement,
    unexplained_per_token,
)
from sparsify.evaluation.results import Evaluation, PositionEvaluation
from sparsify.kernels.chunked import fast_chunk_size
from sparsify.kernels.unembedding import Unembedding
from sparsify.losses.passes import NO_TARGET
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.acts import SAEActs
from sparsify.saes.base import eval_mode
from sparsify.saes.firing import FiringCounter
from sparsify.tlens.hooked_model import HookedModel

Kept = Callable[[Tensor], Tensor]
"""From the tokens of a batch to which of them count."""


def evaluate(
    model: SAETransformer,
    batches: Iterable[Int[Tensor, "_ _"]],
    *,
    kept: Kept | None = None,
    chunk_size: int | None = None,
) -> Evaluation:
    """How good the SAEs of `model` are on some tokens, with all of them spliced in together.

    Cross-entropy is that of predicting tokens 2 to n of each sequence. KL, top-1 agreement and what
    is measured at the SAEs is over all positions, as in the original system: the first (BOS, often
    an outlier) and the last, whose next token is unknown.

    The model is left as it was: no hook, its modules' training mode restored, no gradients.

    Args:
        model: Model and SAEs.
        batches: Token ids, of shape `batch pos`, which may differ between them. Read twice, and
            must give the same sequences both times, in any batches and order: a list, or a loader
            that starts again from the same place.
        kept: Says which tokens count, a boolean for each. None: all.
        chunk_size: Tokens whose logits exist at a time. None takes as many as are fast.

    Raises:
        UserError: The model's logits are not those of its final norm and unembedding.
        ValueError: `batches` can be read only once, is empty or was not the same the second time,
            or a sequence has no next token to predict, or more tokens than the model's context.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches: a {type(batches).__name__} can be read only once, and is read twice here; "
            "give a list of batches, or a loader"
        )
    model.hooked_model.check_unembedding()
    with eval_mode(model):
        passes = ForkedPasses(model)
        means, n_tokens = _collect_means(passes, batches, kept, model.device)
        measurement = _Measurement(passes, means, kept, model.device, chunk_size)
        for tokens in batches:
            measurement.add(tokens)
        if measurement.n_tokens != n_tokens:
            raise ValueError(
                f"batches: gave {n_tokens} tokens when first read, and {measurement.n_tokens} when "
                "read again; give a list of batches"
            )
        return measurement.result()


def check_batch(model: HookedModel, tokens: Int[Tensor, "..."]) -> None:
    """Raise a `ValueError` if tokens are no batch of sequences that the model can predict."""
    if tokens.ndim != 2:
        raise ValueError(
            f"batches: a batch of shape {tuple(tokens.shape)}; give a list of batches, each of "
            "shape (batch, position)"
        )
    model.check_length(tokens.shape[1])
    if tokens.shape[1] < 2:
        raise ValueError(
            f"batches: a sequence of {tokens.shape[1]} tokens has no next token to predict; "
            "give 2 tokens or more"
        )


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
    """The means over all tokens, and the number of tokens."""
    raw, target = ActSums(), ActSums()
    n_tokens = 0
    for tokens in batches:
        check_batch(passes.model, tokens)
        on_device = tokens.to(device)
        counts = None if kept is None else kept(on_device)
        n_tokens += tokens.numel() if counts is None else int(counts.sum())
        with torch.no_grad():
            prefix = passes.shared_prefix(on_device)
            passes.suffix(prefix, raw.hooks(passes.positions, counts), passes.last_sae_stop)
            if len(passes.positions) > 1:  # a single SAE reads the raw activation
                add = partial(_add_target, target, counts)
                passes.suffix(prefix, passes.splice_hooks(add), passes.last_sae_stop)
    if n_tokens == 0:
        raise ValueError("batches: hold no tokens; give at least one batch")
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
        # By name of what is summed and position, "" if it has none.
        self.sums: dict[tuple[str, str], float] = defaultdict(float)

    def add(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Measure a batch."""
        sums: dict[tuple[str, str], Tensor] = {}
        on_device = tokens.to(self.device)
        kept = None if self.kept is None else self.kept(on_device)

        def observe(position: str, acts: SAEActs) -> None:
            acts = acts if kept is None else acts.only(kept)
            self.firings[position].update(acts.c)
            for name, value in sae_sums(acts, self.means.target[position]).items():
                sums[name, position] = value

        with torch.no_grad():
            prefix = self.passes.shared_prefix(on_device)
            resids = {
                "raw": self.passes.suffix(prefix, {}),
                "spliced": self.passes.suffix(prefix, self.passes.splice_hooks(observe)),
                "zero_ablated": self.passes.suffix(prefix, constant_hooks(self.means.zeros)),
                "mean_ablated": self.passes.suffix(prefix, constant_hooks(self.means.raw)),
            }
            unembed = self.passes.model.unembed
            of_logits = prediction_sums(resids, on_device, unembed, self.chunk_size, kept)
            sums |= {(name, ""): value for name, value in of_logits.items()}
            # One transfer from the device for all.
            values = torch.stack([value.float() for value in sums.values()]).tolist()
        for key, value in zip(sums, values, strict=True):
            self.sums[key] += value
        self.n_samples += len(tokens)
        self.n_tokens += tokens.numel() if kept is None else int(kept.sum())
        has_next = tokens[:, 1:]
        self.n_predictions += has_next.numel() if kept is None else int(kept[:, :-1].sum())

    def result(self) -> Evaluation:
        """What was measured, over all batches."""
        sums = {name: value for (name, position), value in self.sums.items() if not position}
        return Evaluation(
            n_samples=self.n_samples,
            n_tokens=self.n_tokens,
            n_predictions=self.n_predictions,
            ce_loss_raw=sums["ce_raw"] / self.n_predictions,
            ce_loss=sums["ce_spliced"] / self.n_predictions,
            ce_loss_zero_ablated=sums["ce_zero_ablated"] / self.n_predictions,
            ce_loss_mean_ablated=sums["ce_mean_ablated"] / self.n_predictions,
            logits_kl=sums["kl"] / self.n_tokens,
            top1_agreement=sums["top1_agreement"] / self.n_tokens,
            positions={position: self._at(position) for position in self.passes.positions},
        )

    def _at(self, position: str) -> PositionEvaluation:
        sae, firings = self.passes.saes.at(position), self.firings[position]
        n_tokens = self.n_tokens
        sums = {name: value for (name, place), value in self.sums.items() if place == position}
        unexplained = sums["unexplained"] / n_tokens
        variance = (sums["unexplained_squared"] - n_tokens * unexplained**2) / (n_tokens - 1)
        n_ratios = sums["n_l2_ratios"]
        return PositionEvaluation(
            n_dict=sae.n_dict,
            l0=firings.l0,
            n_alive=firings.n_alive,
            mse=sums["errors"] / n_tokens / sae.d_out,
            explained_variance=explained_variance(sums["errors"], sums["deviations"]),
            explained_variance_per_token=1 - unexplained,
            explained_variance_per_token_std=max(variance, 0.0) ** 0.5,
            l2_ratio=sums["l2_ratios"] / n_ratios if n_ratios else float("nan"),
        )


def sae_sums(acts: SAEActs, mean_target: Float[Tensor, " d_out"]) -> dict[str, Float[Tensor, ""]]:
    """Sums over tokens of what is measured at one SAE."""
    target, output = acts.target.float(), acts.output.float()
    errors = squared_distance(output, target)
    deviations = squared_distance(target, mean_target)
    unexplained = unexplained_per_token(errors, deviations)
    ratios = l2_ratio(output, target)
    return {
        "errors": errors.sum(),
        "deviations": deviations.sum(),
        "unexplained": unexplained.sum(),
        "unexplained_squared": unexplained.square().sum(),
        "l2_ratios": ratios.nansum(),
        "n_l2_ratios": (~ratios.isnan()).sum().float(),
    }


def prediction_sums(
    resids: Mapping[str, Float[Tensor, "batch pos d_model"]],
    tokens: Int[Tensor, "batch pos"],
    unembed: Unembedding,
    chunk_size: int | None,
    kept: Bool[Tensor, "batch pos"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Sums over tokens of what is measured at the logits, of which a chunk exists at a time.

    Args:
        resids: Final residual streams of each run, `raw` and `spliced` among them.
        tokens: What the passes read. The last of a sequence has no cross-entropy.
        unembed: Final norm and unembedding.
        chunk_size: Tokens in a chunk. None takes as many as are fast.
        kept: Tokens that count. None: all.

    Returns:
        `ce_<run>` for each run, and `kl` and `top1_agreement` of the spliced pass with the raw one.
    """
    targets = F.pad(tokens[:, 1:].long(), (0, 1), value=NO_TARGET).flatten()
    rows = {name: resid.flatten(end_dim=-2) for name, resid in resids.items()}
    if kept is not None:
        targets = targets[kept.flatten()]
        rows = {name: resid[kept.flatten()] for name, resid in rows.items()}
    size = chunk_size or fast_chunk_size(unembed)
    sums = defaultdict(lambda: torch.zeros((), device=tokens.device))
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        log_raw = _log_probs(rows["raw"][part], unembed)
        for name in rows:
            log_probs = log_raw if name == "raw" else _log_probs(rows[name][part], unembed)
            sums[f"ce_{name}"] += cross_entropy(log_probs, targets[part]).sum()
            if name == "spliced":
                sums["kl"] += kl_divergence(log_raw, log_probs).sum()
                sums["top1_agreement"] += top1_agreement(log_raw, log_probs).sum()
    return dict(sums)


def _log_probs(resid: Tensor, unembed: Unembedding) -> Tensor:
    logits = unembed(resid)
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
