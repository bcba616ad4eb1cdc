import dataclasses
import json
import math

import pytest

from sparsify.evaluation.results import Evaluation, PositionEvaluation
from sparsify.evaluation.table import format_table

POSITION = "blocks.1.hook_resid_pre"
SAE = PositionEvaluation(
    n_dict=2048,
    l0=12.25,
    n_alive=1536,
    mse=0.5,
    explained_variance=0.625,
    explained_variance_per_token=-2.5,
    explained_variance_per_token_std=4.0,
    l2_ratio=0.75,
)
EVALUATION = Evaluation(
    n_samples=4,
    n_tokens=2048,
    n_predictions=2044,
    ce_loss_raw=3.0,
    ce_loss=3.5,
    ce_loss_zero_ablated=8.0,
    ce_loss_mean_ablated=7.0,
    logits_kl=0.25,
    top1_agreement=0.5,
    positions={POSITION: SAE},
)


def test_metrics_have_the_names_values_and_order_of_the_logs():
    assert list(EVALUATION.metrics().items()) == [
        ("performance/eval/ce_loss", 3.5),
        ("performance/eval/ce_loss_raw", 3.0),
        ("performance/eval/ce_loss_zero_ablated", 8.0),
        ("performance/eval/ce_loss_mean_ablated", 7.0),
        ("performance/eval/ce_loss_increase", 0.5),
        ("performance/eval/difference_ce_loss", -0.5),
        ("performance/eval/ce_recovered_zero", 0.9),  # (8 - 3.5) / (8 - 3)
        ("performance/eval/ce_recovered_mean", 0.875),  # (7 - 3.5) / (7 - 3)
        ("performance/eval/top1_agreement", 0.5),
        ("loss/eval/logits_kl", 0.25),
        ("sparsity/alive_dict_elements_n_tokens", 2048.0),
        (f"sparsity/eval/L_0/{POSITION}", 12.25),
        (f"sparsity/alive_dict_elements/{POSITION}", 1536.0),
        (f"loss/eval/out_to_in/{POSITION}", 0.5),
        (f"loss/eval/out_to_in/explained_variance/{POSITION}", -2.5),
        (f"loss/eval/out_to_in/explained_variance_std/{POSITION}", 4.0),
        (f"loss/eval/out_to_in/explained_variance_ratio_of_sums/{POSITION}", 0.625),
        (f"loss/eval/out_to_in/l2_ratio/{POSITION}", 0.75),
    ]


def test_json_holds_the_same_numbers():
    content = json.loads(json.dumps(EVALUATION.to_json(), allow_nan=False))
    assert content["metrics"] == EVALUATION.metrics()
    assert content["n_dict"] == {POSITION: 2048}
    assert (content["n_samples"], content["n_tokens"], content["n_predictions"]) == (4, 2048, 2044)


def test_undefined_numbers_are_null_in_json():
    harmless = dataclasses.replace(EVALUATION, ce_loss_zero_ablated=2.0)
    assert math.isnan(harmless.ce_recovered_zero)
    content = json.loads(json.dumps(harmless.to_json(), allow_nan=False))
    assert content["metrics"]["performance/eval/ce_recovered_zero"] is None
    assert "n/a" in format_table(harmless)


def test_table_shows_what_counts():
    lines = [" ".join(line.split()) for line in format_table(EVALUATION).splitlines()]
    assert "Evaluated on 2,048 tokens (4 sequences)" in lines
    assert "original model 3.0000" in lines
    assert "with SAE 3.5000 +0.5000" in lines
    assert "with zeros instead 8.0000 +5.0000 90.0 %" in lines
    assert "with the mean activation instead 7.0000 +4.0000 87.5 %" in lines
    assert "KL(original || with SAE): 0.2500 nats per token" in lines
    assert f"{POSITION} 12.2 1,536 of 2,048 0.625 0.750" in lines


@pytest.mark.parametrize("n_saes", [1, 12])
def test_table_fits_on_a_terminal(n_saes: int):
    positions = {f"blocks.{block}.hook_resid_pre": SAE for block in range(n_saes)}
    table = format_table(dataclasses.replace(EVALUATION, positions=positions))
    assert all(name in table for name in positions)
    assert max(map(len, table.splitlines())) <= 80
