"""Entries of metrics: the name of a metric in the logs, and how it is summed and divided.

A field of `Evaluation` or `PositionEvaluation` that is annotated with an entry is measured by
`evaluate`, and logged. The class of the entry is the level at which the metric is measured:

    PredictionMetric  mean over predictions of the next token, of one model
    TokenMetric       mean over tokens, of the raw model and another
    SAEMetric         number of one SAE, made of sums over tokens; `sae_mean` is the one for a mean

Dimensions: `token` is all tokens of a batch, or of a part of it, that count; `*sample` the same
with batch and position apart; `n_dict` the number of dictionary elements; `d_out` the width of the
activation that an SAE writes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar, get_args, get_type_hints

from jaxtyping import Float, Int
from torch import Tensor

from sparsify.evaluation.metrics import squared_distance, unexplained_per_token
from sparsify.losses.kept import NO_TARGET
from sparsify.saes.firing import FiringCounter

Pass = Literal["raw", "spliced", "zero_ablated", "mean_ablated"]
"""Passes of each batch: the model as it was, with SAEs, and with zeros or means in their place."""

LogProbs = Float[Tensor, "token d_vocab"]
Targets = Int[Tensor, " token"]


@dataclass(frozen=True)
class PredictionMetric:
    """Mean over predictions of the next token that count; a sequence's last token has none."""

    name: str
    """In the logs."""

    calc: Callable[[LogProbs, Targets], Tensor]
    """From log-probabilities and the tokens that did follow to a value for each token."""

    of: Pass = "spliced"
    """The pass that is measured."""

    def values(self, orig: LogProbs, new: LogProbs, targets: Targets) -> Tensor:
        """Value of each token, 0 where there is no prediction."""
        return self.calc(new, targets).where(targets != NO_TARGET, 0)


@dataclass(frozen=True)
class TokenMetric:
    """Mean over tokens of a comparison with the raw model's predictions."""

    name: str
    """In the logs."""

    calc: Callable[[LogProbs, LogProbs], Tensor]
    """From log-probabilities, the raw model's first, to a value for each token."""

    of: Pass = "spliced"
    """The pass that is compared with the raw one."""

    def values(self, orig: LogProbs, new: LogProbs, targets: Targets) -> Tensor:
        """Value of each token."""
        return self.calc(orig, new)


@dataclass(frozen=True)
class SAETokens:
    """Activations of one SAE on the tokens of a batch that count."""

    c: Float[Tensor, "*sample n_dict"]

    target: Float[Tensor, "*sample d_out"]
    """The activation in whose place it writes, in float32 as all that follows."""

    output: Float[Tensor, "*sample d_out"]

    mean_target: Float[Tensor, " d_out"]
    """Over all tokens of the evaluation."""

    @cached_property
    def errors(self) -> Float[Tensor, "*sample"]:
        """||output - target||^2."""
        return squared_distance(self.output, self.target)

    @cached_property
    def deviations(self) -> Float[Tensor, "*sample"]:
        """||target - mean||^2."""
        return squared_distance(self.target, self.mean_target)

    @cached_property
    def unexplained(self) -> Float[Tensor, "*sample"]:
        """Errors relative to deviations."""
        return unexplained_per_token(self.errors, self.deviations)


@dataclass(frozen=True)
class SAETotals:
    """Everything that the number of a metric can be made of, once all tokens have been read."""

    sums: Mapping[str, float]
    """The metric's own, by name, over all tokens."""

    n_tokens: int

    d_out: int

    firings: FiringCounter
    """Counts of how often each dictionary element fired."""


def _no_sums(at: SAETokens) -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True)
class SAEMetric:
    """Number of one SAE, made of sums over tokens, and of how often its elements fire."""

    name: str
    """In the logs, before a slash and the hook point."""

    value: Callable[[SAETotals], float]
    """From the sums over all batches to the number."""

    sums: Callable[[SAETokens], Mapping[str, Tensor]] = _no_sums
    """From the tokens of a batch to sums over them by name, each a tensor without dimensions."""


def sae_mean(name: str, calc: Callable[[SAETokens], Tensor]) -> SAEMetric:
    """Mean over the tokens whose value is not NaN; NaN if there are none."""

    def sums(at: SAETokens) -> Mapping[str, Tensor]:
        values = calc(at)
        return {"values": values.nansum(), "n": (~values.isnan()).sum()}

    def value(totals: SAETotals) -> float:
        n = totals.sums["n"]
        return totals.sums["values"] / n if n else math.nan

    return SAEMetric(name, value, sums)


Entry = TypeVar("Entry", PredictionMetric, TokenMetric, SAEMetric)


def entries(result: type, level: type[Entry]) -> dict[str, Entry]:
    """Return the entries of one level in a class's annotations, by field and in their order.

    Raises:
        ValueError: Two have the same name, or one measures a pass that is not made.
    """
    found = {
        field: part
        for field, hint in get_type_hints(result, include_extras=True).items()
        for part in get_args(hint)
        if isinstance(part, level)
    }
    names = [entry.name for entry in found.values()]
    for field, entry in found.items():
        if names.count(entry.name) > 1:
            raise ValueError(f"{field}: the name {entry.name} is that of another metric too")
        if not isinstance(entry, SAEMetric) and entry.of not in get_args(Pass):
            raise ValueError(f"{field}: no pass is called {entry.of}, only {get_args(Pass)}")
    return found


def logged(result: object, level: type[Entry]) -> dict[str, float]:
    """Values of the fields that have an entry of one level, by their names in the logs."""
    found = entries(type(result), level)
    return {entry.name: float(getattr(result, field)) for field, entry in found.items()}
