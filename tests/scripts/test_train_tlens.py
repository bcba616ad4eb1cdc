import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparsify.scripts.train_tlens.evaluation import TextLoss
from sparsify.scripts.train_tlens.run_train_tlens import main
from sparsify.scripts.train_tlens.trigram import TrigramModel

from .conftest import write_yaml

pytestmark = pytest.mark.slow


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_evaluates_and_leaves_a_model(lm_run: Path):
    metrics = read_metrics(lm_run)
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < losses[0]
    assert sum("performance/eval/bits_per_byte" in line for line in metrics) == 4  # 8, 16, 24, end
    assert {path.name for path in (lm_run / "model").iterdir()} >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    card = (lm_run / "model" / "README.md").read_text()
    assert "bits per byte" in card
    assert "trigram" in card


def test_a_resumed_run_ends_as_if_it_had_not_stopped(
    lm_run: Path, lm_config: dict[str, Any], tmp_path: Path
):
    config = write_yaml(tmp_path / "config.yaml", lm_config)
    out = tmp_path / "out"
    # The rest of a run of 24 samples, from its state at 16.
    assert main([str(config), "--save_dir", str(out), "--n_samples", "16"]) == 0
    (run_dir,) = out.iterdir()
    assert main([str(config), "--save_dir", str(out), "--resume", str(run_dir)]) == 0
    expected = load_file(lm_run / "samples_24.safetensors")
    for name, tensor in load_file(run_dir / "samples_24.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_trigram_probabilities_match_hand_computation():
    # Training: 0 1 0 1, so unigrams of positions 0..3: two 0, two 1; n = 4, t = 2 successors.
    model = TrigramModel(np.array([[0, 1, 0, 1]]), d_vocab=4)
    # p1(0) = (2 + 2 / 4) / (4 + 2) = 2.5 / 6
    # p2(0 | 1): after 1 comes 0, once; n = 1, t = 1: (1 + 1 * p1(0)) / (1 + 1)
    # p3(0 | 0 1): after 0 1 comes 0, once:           (1 + 1 * p2(0 | 1)) / 2
    p1 = 2.5 / 6
    p2 = (1 + p1) / 2
    p3 = (1 + p2) / 2
    # Sequence 0 1 0: the 1 is scored after one token: p2(1 | 0) with n = 2, t = 1, p1(1) = 2.5 / 6
    p2_of_1 = (2 + p1) / 3
    loss = model.text_loss(np.array([[0, 1, 0]]), torch.tensor([1, 3, 0, 0]))
    assert loss.nats_per_token == pytest.approx(-(np.log(p2_of_1) + np.log(p3)) / 2)
    assert loss.n_bytes == 3 + 1


@pytest.mark.parametrize("before", [[0, 1], [3, 3], [1, 0]])
def test_trigram_probabilities_sum_to_one(before: list[int]):
    model = TrigramModel(np.array([[0, 1, 2, 0, 1, 3, 0, 1, 2]]), d_vocab=5)
    sequences = np.array([[*before, token] for token in range(5)])
    assert model._probs(sequences[:, :2], sequences[:, 2]).sum() == pytest.approx(1)


def test_bits_per_byte_matches_hand_computation():
    # 2 tokens of 3 and 5 bytes cost 8 bits = 8 ln 2 nats in all: 1 bit per byte.
    targets = torch.tensor([0, 1])
    loss = TextLoss.from_nats(8 * np.log(2), targets, torch.tensor([3, 5]))
    assert loss.bits_per_byte == pytest.approx(1)
    assert loss.nats_per_token == pytest.approx(4 * np.log(2))
