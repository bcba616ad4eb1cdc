import math
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import torch
from example_saes import FIRST, LAST, model_with
from torch import Tensor
from torch.nn import functional as F

from sparsify.evaluation import evaluate as evaluate_module
from sparsify.evaluation.entries import (
    PredictionMetric,
    SAEMetric,
    SAETokens,
    SAETotals,
    TokenMetric,
    entries,
    logged,
    sae_mean,
)
from sparsify.evaluation.evaluate import evaluate
from sparsify.evaluation.results import Evaluation, PositionEvaluation
from sparsify.losses.kept import NO_TARGET
from sparsify.saes.firing import FiringCounter

# Metrics added as CONTRIBUTING.md says: a formula, and a field with an entry


def is_right(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.argmax(dim=-1) == targets


def total_variation(orig_log_probs: Tensor, new_log_probs: Tensor) -> Tensor:
    return (orig_log_probs.exp() - new_log_probs.exp()).abs().sum(dim=-1) / 2


@dataclass(frozen=True)
class MoreOfSAE(PositionEvaluation):
    cosine: Annotated[
        float,
        sae_mean("sae/cosine", lambda at: F.cosine_similarity(at.output, at.target, dim=-1)),
    ]

    density: Annotated[
        float,
        SAEMetric(
            "sae/density",
            lambda totals: totals.sums["fired"] / totals.n_tokens / len(totals.firings.counts),
            sums=lambda at: {"fired": torch.count_nonzero(at.c)},
        ),
    ]


@dataclass(frozen=True)
class MoreOfModel(Evaluation):
    accuracy: Annotated[float, PredictionMetric("accuracy", is_right)]
    accuracy_raw: Annotated[float, PredictionMetric("accuracy_raw", is_right, of="raw")]
    total_variation: Annotated[float, TokenMetric("total_variation", total_variation)]


@pytest.mark.model
def test_a_new_metric_is_measured_and_logged_once_it_has_an_entry(
    tlens_model: Any, monkeypatch: pytest.MonkeyPatch
):
    model = model_with(tlens_model, "relu")
    tokens = torch.randint(64, (5, 7))
    before = evaluate(model, [tokens]).metrics()
    monkeypatch.setattr(evaluate_module, "Evaluation", MoreOfModel)
    monkeypatch.setattr(evaluate_module, "PositionEvaluation", MoreOfSAE)
    result = evaluate(model, tokens.split([2, 3]), chunk_size=4)

    with torch.no_grad():
        raw_logits, _ = model.forward_raw(tokens)
        logits, acts = model(tokens)
    assert raw_logits is not None
    raw, new = raw_logits.softmax(dim=-1), logits.softmax(dim=-1)
    expected = {
        "accuracy": (new[:, :-1].argmax(dim=-1) == tokens[:, 1:]).float().mean(),
        "accuracy_raw": (raw[:, :-1].argmax(dim=-1) == tokens[:, 1:]).float().mean(),
        "total_variation": (raw - new).abs().sum(dim=-1).mean() / 2,
    }
    for position in (FIRST, LAST):
        at = acts[position]
        cosine = F.cosine_similarity(at.output, at.target, dim=-1).mean()
        expected[f"sae/cosine/{position}"] = cosine
        expected[f"sae/density/{position}"] = (at.c != 0).float().mean()
    metrics = result.metrics()
    found = {name: metrics[name] for name in expected}
    assert found == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-4)
    # The others are as before, and in the same order.
    others = {name: value for name, value in metrics.items() if name not in expected}
    assert list(others) == list(before)
    assert others == pytest.approx(before, rel=1e-4, abs=1e-5, nan_ok=True)
    assert isinstance(result, MoreOfModel)
    assert result.accuracy == metrics["accuracy"]


# Parts


def test_entries_are_those_of_one_level_by_field():
    assert list(entries(MoreOfModel, TokenMetric)) == [
        "top1_agreement",
        "logits_kl",
        "total_variation",
    ]
    assert entries(MoreOfModel, SAEMetric) == {}
    assert entries(MoreOfSAE, SAEMetric)["density"].name == "sae/density"


def test_logged_are_the_fields_with_an_entry_by_its_name():
    @dataclass(frozen=True)
    class Result:
        plain: float
        measured: Annotated[int, TokenMetric("log/measured", total_variation)]

    assert logged(Result(1.0, 2), TokenMetric) == {"log/measured": 2.0}
    assert logged(Result(1.0, 2), PredictionMetric) == {}


def test_a_prediction_metric_leaves_out_tokens_that_have_no_next_one():
    log_probs = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]).log()
    metric = PredictionMetric("p", lambda log_probs, targets: log_probs.exp().amax(dim=-1))
    targets = torch.tensor([0, NO_TARGET, 0])
    assert metric.values(log_probs, log_probs, targets).tolist() == [0.75, 0.0, 0.75]


def totals(sums: dict[str, float]) -> SAETotals:
    return SAETotals(sums, n_tokens=4, d_out=2, firings=FiringCounter(3))


def test_mean_at_an_sae_is_over_the_tokens_that_have_a_value():
    metric = sae_mean("m", lambda at: at.output[:, 0])
    rows = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [4.0, 0.0], [math.nan, 0.0]])
    at = SAETokens(torch.zeros(4, 3), torch.zeros(4, 2), rows, torch.zeros(2))
    sums = {name: value.item() for name, value in metric.sums(at).items()}
    assert metric.value(totals(sums)) == 2.5  # (1 + 4) / 2
    assert math.isnan(metric.value(totals(dict.fromkeys(sums, 0.0))))


def test_names_in_the_logs_are_distinct():
    names = [
        metric.name
        for found in (
            entries(Evaluation, PredictionMetric),
            entries(Evaluation, TokenMetric),
            entries(PositionEvaluation, SAEMetric),
        )
        for metric in found.values()
    ]
    assert len(set(names)) == len(names) == 13
