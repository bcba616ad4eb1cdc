"""The whole suite of metrics: `evaluate`, and what takes more passes or looks at weights.

In addition to what `evaluate` does, each batch is read once more, for three passes that share
everything before the first SAE:

    tokens ─ shared prefix ─┬─ raw
                            ├─ spliced: each SAE's output in its place
                            └─ raw, with a random error as long as the SAE's added in its place

As in `evaluate` all SAEs take part at once, and what counts is `kept` tokens alone.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparsify.evaluation.batches import Batches, Kept, kept_tokens_of, read_batches
from sparsify.evaluation.evaluate import evaluate
from sparsify.evaluation.forked_passes import ForkedPasses
from sparsify.evaluation.geometry import nearest_cosine
from sparsify.evaluation.metrics import explained_variance, l2_ratio, squared_distance
from sparsify.evaluation.results import Evaluation
from sparsify.evaluation.suite_results import LaterError, PositionSuite, Suite
from sparsify.kernels.chunked import chunked_kl
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.acts import SAEActs
from sparsify.saes.base import eval_mode
from sparsify.saes.firing import FiringCounter
from sparsify.splicing.hooks import keep_hooks
from sparsify.tlens.hook_names import first_block
from sparsify.tlens.hooked_model import Hook, Prefix

RANDOM_ERROR_SEED = 0


def evaluate_suite(
    model: SAETransformer,
    batches: Batches,
    *,
    kept: Kept | None = None,
) -> Suite:
    """Measure all that there is to measure of the SAEs of `model` on some tokens.

    The model is left as it was. Takes about twice as long as `evaluate`.

    Args:
        model: Model and SAEs.
        batches: As `evaluate` takes them, read three times.
        kept: Says which tokens count, a boolean for each. None: all.

    Raises:
        UserError, ValueError: As by `evaluate`.
    """
    evaluation = evaluate(model, batches, kept=kept)
    with eval_mode(model), torch.no_grad():
        third_reading = _ThirdReading(model, kept)
        for tokens in read_batches(model, batches):
            third_reading.add(tokens)
        return third_reading.result(evaluation)


def later_hooks(positions: Sequence[str], n_blocks: int) -> list[str]:
    """The residual stream before every block behind the first SAE's, and after the last block.

    Empty if the first SAE writes the residual stream after the last block itself.
    """
    first = min(map(first_block, positions))
    if first == n_blocks:
        return []
    before = [f"blocks.{block}.hook_resid_pre" for block in range(first + 1, n_blocks)]
    return [*before, f"blocks.{n_blocks - 1}.hook_resid_post"]


def random_errors(
    norms: Float[Tensor, "*sample"], d_out: int, generator: torch.Generator
) -> Float[Tensor, "*sample d_out"]:
    """Errors of the given norms, in directions that are uniformly distributed.

    `generator` is one of the CPU, so that the errors are the same on every device.
    """
    normal = torch.randn(*norms.shape, d_out, generator=generator).to(norms)
    return F.normalize(normal, dim=-1) * norms.unsqueeze(-1)


def add_hook(error: Float[Tensor, "batch pos d_act"]) -> Hook:
    """A hook that adds an error to what passes, whose heads, if any, the error has flattened."""

    def hook(act: Tensor) -> Tensor:
        return (act.to(error) + error.reshape(act.shape)).to(act)

    return hook


class RunningVariance:
    """Sum of the squared distances of all rows to their mean, in one reading of the batches.

    That of each batch is computed from its own mean, and batches are merged as in Chan, Golub &
    LeVeque 1979, which does not lose digits where the mean is large.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean: Tensor = torch.zeros((), dtype=torch.float64)
        self.deviations = 0.0

    def add(self, rows: Float[Tensor, "token d_act"]) -> None:
        """Add the activations of some tokens, at least one."""
        mean = rows.mean(dim=0)
        shift = mean.cpu().double() - self.mean
        share = len(rows) / (self.n + len(rows))
        self.deviations += squared_distance(rows, mean).sum().item()
        self.deviations += shift.square().sum().item() * self.n * share
        self.mean = self.mean + shift * share
        self.n += len(rows)


class _ThirdReading:
    """Sums of the reading that `evaluate` does not do."""

    def __init__(self, model: SAETransformer, kept: Kept | None) -> None:
        self.passes = ForkedPasses(model)
        self.kept = kept
        self.device = model.device
        self.generator = torch.Generator().manual_seed(RANDOM_ERROR_SEED)
        self.later = later_hooks(self.passes.positions, self.passes.model.n_blocks)
        self.variances = {hook: RunningVariance() for hook in self.later}
        self.firings = {
            position: FiringCounter(self.passes.saes.at(position).n_dict, self.device)
            for position in self.passes.positions
        }
        self.n_tokens = 0
        # By name of what is summed and hook point, "" if it has none.
        self.sums: dict[tuple[str, str], float] = defaultdict(float)

    def add(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Measure a batch."""
        kept = kept_tokens_of(self.kept, tokens)
        if kept is None:
            kept = torch.ones_like(tokens, dtype=torch.bool)
        if not kept.any():
            return
        prefix = self.passes.shared_prefix(tokens)
        raw_acts: dict[str, Tensor] = {}
        raw = self.passes.suffix(prefix, keep_hooks(self.later, raw_acts))
        norms = self._splice(prefix, raw_acts, kept)
        errors = {
            position: random_errors(norm, self.passes.saes.at(position).d_out, self.generator)
            for position, norm in norms.items()
        }
        hooks = {position: add_hook(error) for position, error in errors.items()}
        with_errors = self.passes.suffix(prefix, hooks)

        n_kept = int(kept.sum())
        kl = chunked_kl(raw[kept], with_errors[kept], self.passes.model.unembed)
        self.sums["random_error_kl", ""] += kl.item() * n_kept
        self.n_tokens += n_kept
        for hook, act in raw_acts.items():
            self.variances[hook].add(act[kept].float())

    def _splice(
        self, prefix: Prefix, raw_acts: dict[str, Tensor], kept: Bool[Tensor, "batch pos"]
    ) -> dict[str, Float[Tensor, "batch pos"]]:
        """Make the spliced pass, and return the norm of each SAE's error on each token."""
        norms: dict[str, Tensor] = {}

        def observe(position: str, acts: SAEActs) -> None:
            norms[position] = (acts.output - acts.target).float().norm(dim=-1)
            self._add_ratios(position, acts, kept)
            self.firings[position].update(acts.c[kept])
            if position in raw_acts:  # what arrives there, before this SAE replaces it
                add_later(position, acts.target)

        def add_later(name: str, act: Tensor) -> None:
            errors = squared_distance(act[kept].float(), raw_acts[name][kept].float())
            self.sums["later_errors", name] += errors.sum().item()

        def later_hook(name: str) -> Hook:
            return lambda act: add_later(name, act)

        hooks = {name: later_hook(name) for name in self.later}
        self.passes.suffix(prefix, self.passes.splice_hooks(observe, hooks))
        return norms

    def _add_ratios(self, position: str, acts: SAEActs, kept: Bool[Tensor, "batch pos"]) -> None:
        ratios = l2_ratio(acts.output.float(), acts.target.float()).where(kept, torch.nan)
        for name, part in {"first": ratios[:, :1], "rest": ratios[:, 1:]}.items():
            self.sums[f"l2_{name}", position] += part.nansum().item()
            self.sums[f"n_l2_{name}", position] += (~part.isnan()).sum().item()

    def result(self, evaluation: Evaluation) -> Suite:
        """Numbers over all batches, with those that `evaluate` found."""
        return Suite(
            evaluation=evaluation,
            later={hook: self._later(hook) for hook in self.later},
            positions={position: self._at(position) for position in self.passes.positions},
            random_error_kl=self.sums["random_error_kl", ""] / self.n_tokens,
        )

    def _later(self, hook: str) -> LaterError:
        error, variance = self.sums["later_errors", hook], self.variances[hook]
        return LaterError(
            mse=error / variance.n / len(variance.mean),
            explained_variance=explained_variance(error, variance.deviations),
        )

    def _at(self, position: str) -> PositionSuite:
        elements = self.passes.saes.at(position).dict_elements
        counts = self.firings[position].counts
        return PositionSuite(
            l2_ratio_first=self._mean_ratio("first", position),
            l2_ratio_rest=self._mean_ratio("rest", position),
            densities=counts.cpu().double() / self.n_tokens,
            nearest=nearest_cosine(elements).cpu(),
            nearest_alive=nearest_cosine(elements[counts > 0]).cpu(),
        )

    def _mean_ratio(self, name: str, position: str) -> float:
        n = self.sums[f"n_l2_{name}", position]
        return self.sums[f"l2_{name}", position] / n if n else math.nan
