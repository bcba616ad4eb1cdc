"""Runs of a kind that knows nothing of text: a linear map, fitted to points in memory."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsify.data.batches import TensorBatches
from sparsify.runs.lifecycle import run_training
from sparsify.runs.preflight import preflight
from sparsify.runs.run_folder import write_result
from sparsify.runs.session import Session
from sparsify.runs.training_run import OpeningStep, TrainingRun
from sparsify.settings.base_config import UserError
from sparsify.training.batch_loss import BatchLoss
from sparsify.training.config import TrainingConfig
from sparsify.training.steps import build_stepper

Points = tuple[Tensor, ...]
"""Inputs and what the map is to make of them."""


class LineRun(TrainingRun[Points]):
    kept_settings = ("seed", "batch_size", "lr")
    weights_step: ClassVar[str] = "model"
    item: ClassVar[str] = "points"
    is_away: ClassVar[bool] = False

    def train(self, session: Session[Points]) -> None:
        for batch in session.batches():
            due = session.due_after(batch)
            loss = self.batch_loss(batch)
            session.check(loss, batch, due)
            self.learn_from(loss, batch)
            session.count(batch)
            if due.log:
                session.log({"loss": loss.total.item()})
            if due.save:
                session.save()

    def batch_loss(self, batch: Points) -> BatchLoss:
        inputs, targets = batch
        return BatchLoss((self.model(inputs) - targets).square().mean(), {})

    def finish(self, session: Session[Points]) -> str:
        if self.run_dir is not None:
            write_result(self.run_dir, {"metrics": {"slope": self.model.weight.item()}})
        return f"slope {self.model.weight.item():.2f}"

    def opening_steps(self) -> list[OpeningStep]:
        return [
            OpeningStep("model", self.open_model),
            OpeningStep("points", self.open_points, needs=("model",)),
        ]

    def open_model(self) -> str:
        self.model = nn.Linear(1, 1)
        return "a line"

    def open_points(self) -> str:
        if self.is_away:
            raise UserError("points: are gone; put them back")
        inputs = torch.linspace(-1, 1, 20)[:, None]
        self.loader = TensorBatches(inputs, 3 * inputs, batch_size=4, seed=self.config.seed)
        return "20"

    def build(self) -> None:
        parameters = list(self.model.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.config.lr)
        self.stepper = build_stepper(parameters, [optimizer], self.config)

    @property
    def trained(self) -> nn.Module:
        return self.model

    def tensors_of(self, batch: Points) -> dict[str, Tensor]:
        return dict(zip(("inputs", "targets"), batch, strict=True))


class AwayRun(LineRun):
    is_away = True


def config(folder: Path, **settings: Any) -> TrainingConfig:
    fixed: Mapping[str, Any] = {
        "batch_size": 4,
        "lr": 0.1,
        "lr_schedule": "constant",
        "log_every_n_grad_steps": 1,
        "save_every_n_samples": 16,
        "save_dir": folder,
    }
    return TrainingConfig.model_validate({"n_samples": 48, **fixed, **settings})


def done(run: LineRun) -> Path:
    run_training(run)
    assert run.run_dir is not None
    return run.run_dir


def test_a_run_leaves_weights_metrics_and_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = done(LineRun(config(tmp_path)))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["n_samples"] for line in lines] == list(range(4, 52, 4))
    assert lines[-1]["loss"] < lines[0]["loss"]
    slope = json.loads((run_dir / "eval.json").read_text())["metrics"]["slope"]
    assert load_file(run_dir / "samples_48.safetensors")["weight"].item() == pytest.approx(slope)
    printed = capsys.readouterr()
    assert printed.out == f"slope {slope:.2f}\n"
    assert f"run folder: {run_dir}" in printed.err
    assert "points/s" in printed.err


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path):
    whole = done(LineRun(config(tmp_path / "whole")))
    half = done(LineRun(config(tmp_path / "half", n_samples=28)))
    assert done(LineRun(config(tmp_path / "half", resume=half))) == half
    name = "samples_48.safetensors"
    torch.testing.assert_close(load_file(half / name), load_file(whole / name), rtol=0, atol=0)
    assert (half / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_dry_run_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert preflight(LineRun(config(tmp_path / "out"), is_trial=True))
    marks = [line[:8].split() for line in capsys.readouterr().out.splitlines()[:-1]]
    assert [mark for mark, _ in marks] == 8 * ["✓"]
    assert not (tmp_path / "out").exists()
    assert not preflight(AwayRun(config(tmp_path / "out"), is_trial=True))
    printed = capsys.readouterr().out
    assert "✗ points    points: are gone; put them back" in printed
    assert "✓ disk" in printed
    assert "– memory    needs points" in printed


def test_a_dry_run_of_a_run_at_its_end_is_well(tmp_path: Path):
    run_dir = done(LineRun(config(tmp_path)))
    assert preflight(LineRun(config(tmp_path, resume=run_dir), is_trial=True))


def test_a_run_that_is_refused_before_its_first_step_leaves_no_folder(tmp_path: Path):
    class RefusedRun(LineRun):
        def train(self, session: Session[Points]) -> None:
            raise UserError("lr: is odd; set another")

    with pytest.raises(UserError, match="lr: is odd"):
        run_training(RefusedRun(config(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_no_folder_is_removed_that_was_there_before(tmp_path: Path):
    run_dir = done(LineRun(config(tmp_path)))
    kept = shutil.copytree(run_dir, tmp_path.with_name("kept"))
    refused = AwayRun(config(tmp_path, n_samples=64, resume=run_dir))
    with pytest.raises(UserError, match="points: are gone"):
        run_training(refused)
    with pytest.raises(AssertionError, match="each run is done once"):
        run_training(refused)
    assert {path.name for path in run_dir.iterdir()} == {path.name for path in kept.iterdir()}


def test_a_batch_with_a_loss_that_is_not_finite_is_kept(tmp_path: Path):
    class BrokenRun(LineRun):
        def batch_loss(self, batch: Points) -> BatchLoss:
            return BatchLoss(super().batch_loss(batch).total * torch.inf, {})

    with pytest.raises(UserError, match=r"loss is inf .* whose inputs and targets are in"):
        run_training(BrokenRun(config(tmp_path)))
    (run_dir,) = tmp_path.iterdir()
    assert load_file(run_dir / "bad_batch_0.safetensors")["targets"].shape == (4, 1)
