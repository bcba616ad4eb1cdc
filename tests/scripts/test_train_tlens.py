import itertools
import json
import re
import signal
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sparsify.scripts.train_tlens.evaluation import TextLoss
from sparsify.scripts.train_tlens.lm_run import LanguageModelRun
from sparsify.scripts.train_tlens.run_train_tlens import main
from sparsify.scripts.train_tlens.trigram import TrigramModel
from sparsify.training.batch_loss import BatchLoss

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
    assert (lm_run / "final_config.yaml").read_text() in card


@pytest.fixture
def half_run(lm_config: dict[str, Any], tmp_path: Path) -> Path:
    """Run folder of the first 16 samples, and beside its parent the config of all 24."""
    config = write_yaml(tmp_path / "config.yaml", lm_config)
    assert main([str(config), "--save_dir", str(tmp_path / "out"), "--n_samples", "16"]) == 0
    (run_dir,) = (tmp_path / "out").iterdir()
    return run_dir


def resume(run_dir: Path, *overrides: str) -> int:
    config = run_dir.parent.parent / "config.yaml"
    save_dir = ["--save_dir", str(run_dir.parent)]
    longer = ["--n_samples", "24"]  # which the config says too, but a run keeps its own
    return main([str(config), *save_dir, *longer, "--resume", str(run_dir), *overrides])


def assert_same_end(run_dir: Path, whole_run: Path) -> None:
    expected = load_file(whole_run / "samples_24.safetensors")
    actual = load_file(run_dir / "samples_24.safetensors")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_resumed_run_ends_as_if_it_had_not_stopped(half_run: Path, lm_run: Path):
    # As after a kill between the weights and the state of 24 samples.
    zeros = {k: v * 0 for k, v in load_file(half_run / "samples_16.safetensors").items()}
    save_file(zeros, half_run / "samples_24.safetensors")
    assert resume(half_run, "--log_every_n_grad_steps", "2") == 0
    assert_same_end(half_run, lm_run)
    kept = yaml.safe_load((half_run / "final_config.yaml").read_text())
    assert (kept["n_samples"], kept["log_every_n_grad_steps"], kept["resume"]) == (24, 2, None)


def test_ctrl_c_in_a_step_loses_nothing(
    lm_config: dict[str, Any], lm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = itertools.count(1)
    batch_loss = LanguageModelRun.batch_loss

    def interrupted(run: LanguageModelRun, tokens: torch.Tensor) -> BatchLoss:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return batch_loss(run, tokens)

    config = write_yaml(tmp_path / "config.yaml", lm_config)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelRun, "batch_loss", interrupted)
        assert main([str(config), "--save_dir", str(tmp_path / "out")]) == 130
    (run_dir,) = (tmp_path / "out").iterdir()
    assert (run_dir / "samples_12.safetensors").exists()
    assert resume(run_dir) == 0
    assert_same_end(run_dir, lm_run)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--n_samples", "8"],
            r"n_samples \(8\) must be at least 16, since the run in '.*' has been trained on 16",
        ),
        (
            ["--model.n_layers", "2", "--train_data.n_epochs", "3", "--lr", "0.5"],
            "lr: 0.5 instead of 0.02, model.n_layers: 2 instead of 3, "
            "train_data.n_epochs: 3 instead of null; remove the change",
        ),
        (["--resume", "/nope"], "resume: there is no folder '/nope'; give the folder of a run"),
    ],
)
def test_what_does_not_go_on_with_the_run_is_refused(
    overrides: list[str], message: str, half_run: Path, capsys: pytest.CaptureFixture[str]
):
    assert resume(half_run, *overrides) == 2
    assert re.search(message, capsys.readouterr().err)


def test_data_that_end_early_are_reported_and_each_checkpoint_is_written_once(
    lm_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "short.txt").write_text(string.printable * 2)
    data = {"dataset_name": str(tmp_path / "short.txt"), "n_ctx": 16}
    config = write_yaml(tmp_path / "config.yaml", {**lm_config, "train_data": data})
    assert main([str(config), "--save_dir", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    assert "train_data: ended after 8 of 24 samples, on which the model was trained" in err
    assert err.count("saved ") == 1  # at 8 samples, which is also the end
    (run_dir,) = (tmp_path / "out").iterdir()
    assert any("train_data_ended_early" in line for line in read_metrics(run_dir))


@pytest.mark.parametrize("data", ["train_data", "eval_data"])
def test_bad_data_leave_no_folder(data: str, lm_config: dict[str, Any], tmp_path: Path):
    config = write_yaml(tmp_path / "config.yaml", lm_config)
    bad = [f"--{data}.dataset_name", "./nothing.txt"]
    assert main([str(config), "--save_dir", str(tmp_path / "out"), *bad]) == 2
    assert not (tmp_path / "out").exists()


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


def test_weights_that_are_not_finite_are_not_saved(
    lm_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_yaml(tmp_path / "config.yaml", lm_config)
    command = [
        str(config),
        "--save_dir",
        str(tmp_path / "out"),
        "--lr",
        "1e38",
        "--adam_lr",
        "1e38",
    ]
    assert main(command) == 2
    assert re.search(
        r"error: (loss|grad_norm|weights or gradients) .*after \d+ samples", capsys.readouterr().err
    )
    (run_dir,) = (tmp_path / "out").iterdir()
    for path in run_dir.glob("samples_*"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
