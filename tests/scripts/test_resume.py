"""Runs that are stopped and go on, beside the same run in one piece."""

import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.runs.checkpoints import load_checkpoint
from sparsify.scripts.train_tlens_saes import run_train_tlens_saes
from sparsify.scripts.train_tlens_saes.run_train_tlens_saes import main
from sparsify.scripts.train_tlens_saes.sae_run import SAERun
from sparsify.training.sae_trainer import SAEBatchLoss

from .conftest import assert_same_end, run_in_one_piece, write_yaml

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.model]


@pytest.fixture(scope="module")
def content(sae_settings: dict[str, Any]) -> dict[str, Any]:
    return {
        **sae_settings,
        "warmup_samples": 8,
        "max_grad_norm": 1.0,
        "eval_every_n_samples": 8,
        "save_every_n_samples": 8,
        "collect_act_frequency_every_n_samples": 12,
        "act_frequency_n_tokens": 128,
        "saes": {**sae_settings["saes"], "dict_size_to_input_ratio": 16.0},
        "train_data": {**sae_settings["train_data"], "n_epochs": None},
    }


@pytest.fixture
def config(content: dict[str, Any], tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "config.yaml", {**content, "save_dir": str(tmp_path / "out")})


@pytest.fixture(scope="module")
def whole(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one piece."""
    return run_in_one_piece(content, tmp_path_factory.mktemp("whole"))


def stop_in_batch(index: int, config: Path, signal_number: int = signal.SIGINT) -> Path:
    """The folder of a run that gets a signal while it computes a batch."""
    calls = itertools.count()
    batch_loss = SAERun.batch_loss

    def interrupted(run: SAERun, tokens: Tensor) -> SAEBatchLoss:
        if next(calls) == index:
            signal.raise_signal(signal_number)
        return batch_loss(run, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAERun, "batch_loss", interrupted)
        assert main([str(config)]) == 130
    (run_dir,) = (config.parent / "out").iterdir()
    return run_dir


@pytest.mark.parametrize("index", range(6))
def test_a_run_that_was_stopped_anywhere_ends_as_if_it_had_not(
    index: int, config: Path, whole: Path
):
    run_dir = stop_in_batch(index, config)
    assert (run_dir / f"checkpoint_{4 * index + 4}.json").exists()
    assert main([str(config), "--resume", str(run_dir)]) == 0
    assert_same_end(run_dir, whole)


def test_row_sparse_gradients_between_two_steps_are_kept(
    content: dict[str, Any], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sparsify.kernels.sparse.MIN_DENSE_SIZE", 0)
    monkeypatch.setattr("sparsify.kernels.sparse.MAX_ACTIVE_SHARE", 1.0)
    run_dir = stop_in_batch(2, config)
    assert main([str(config), "--resume", str(run_dir)]) == 0
    assert_same_end(run_dir, run_in_one_piece(content, tmp_path / "whole"))


def test_sigterm_prints_the_line_that_goes_on(
    config: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("sys.argv", ["run_train_tlens_saes.py"])
    run_dir = stop_in_batch(2, config, signal.SIGTERM)
    last_line = capsys.readouterr().err.splitlines()[-1]
    said, _, command = last_line.partition("resume with: ")
    assert said == "interrupted; "
    assert shlex.split(command)[:2] == [sys.executable, "run_train_tlens_saes.py"]
    assert main(shlex.split(command)[2:]) == 0
    assert_same_end(run_dir, whole)


def test_a_signal_to_every_process_loses_nothing(config: Path):
    script = str(run_train_tlens_saes.__file__)
    command = [sys.executable, script, str(config), "--n_samples", "100000"]
    command += ["--log_every_n_grad_steps", "5"]
    with subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "/100,000 samples: loss" in line:
                break
        os.killpg(process.pid, signal.SIGTERM)
        last_lines = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted; resume with: " in last_lines
    (run_dir,) = (config.parent / "out").iterdir()
    n_samples = load_checkpoint(run_dir).n_samples
    assert load_file(run_dir / f"samples_{n_samples}.safetensors")


def test_another_model_is_not_gone_on_with(
    content: dict[str, Any], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = tmp_path / "model"
    shutil.copytree(content["tlens_model_path"], model)
    write_yaml(
        config, {**content, "save_dir": str(tmp_path / "out"), "tlens_model_path": str(model)}
    )
    run_dir = stop_in_batch(3, config)
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, model / "model.safetensors")
    assert main([str(config), "--resume", str(run_dir)]) == 2
    assert "use the model that they belong to" in capsys.readouterr().err


def test_a_model_that_was_moved_is_named_again(
    content: dict[str, Any],
    config: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    model = tmp_path / "model"
    shutil.copytree(content["tlens_model_path"], model)
    write_yaml(
        config, {**content, "save_dir": str(tmp_path / "out"), "tlens_model_path": str(model)}
    )
    run_dir = stop_in_batch(3, config)
    moved = model.rename(tmp_path / "moved")
    assert main(["--resume", str(run_dir)]) == 2
    assert f"'{model / 'model.safetensors'}' cannot be read (No such" in capsys.readouterr().err
    assert main(["--resume", str(run_dir), "--tlens_model_path", str(moved)]) == 0
    assert f'tlens_model_path: "{moved}" instead of "{model}"' in capsys.readouterr().err
    assert_same_end(run_dir, whole)


def test_resume_alone_means_the_newest_run(config: Path, whole: Path):
    run_dir = stop_in_batch(3, config)
    assert main([str(config), "--resume"]) == 0
    assert_same_end(run_dir, whole)


def test_what_was_written_after_the_checkpoint_is_left_out(config: Path, whole: Path):
    run_dir = stop_in_batch(3, config)
    (run_dir / ".state_24.pt.1.tmp").write_bytes(b"half")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"n_samples": 20, "lo')
    assert main([str(config), "--resume", str(run_dir)]) == 0
    assert_same_end(run_dir, whole)
    assert not list(run_dir.glob(".*.tmp"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    config: Path, whole: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = stop_in_batch(4, config)
    path = run_dir / "state_20.pt"
    path.write_bytes(path.read_bytes()[:-100])
    capsys.readouterr()
    assert main([str(config), "--resume", str(run_dir)]) == 0
    assert f"warning: {path}: is damaged" in capsys.readouterr().err
    assert_same_end(run_dir, whole)


def test_a_chosen_checkpoint_is_gone_on_from(config: Path, whole: Path):
    run_dir = stop_in_batch(4, config)
    assert sorted(path.name for path in run_dir.glob("checkpoint_*")) == [
        "checkpoint_16.json",
        "checkpoint_20.json",
    ]
    assert main([str(config), "--resume", str(run_dir / "samples_16.safetensors")]) == 0
    assert_same_end(run_dir, whole)
    assert {path.name for path in run_dir.glob("state_*")} == {"state_16.pt", "state_24.pt"}
    assert {path.name for path in run_dir.glob("abandoned_*")} == {
        *("abandoned_samples_20.safetensors", "abandoned_state_20.pt"),
        "abandoned_checkpoint_20.json",
    }


def test_checkpoints_by_the_clock(config: Path, whole: Path):
    overrides = ["--save_every_n_samples", "null", "--save_every_minutes", "1e-9"]
    save_dir = config.parent / "clock"
    assert main([str(config), "--save_dir", str(save_dir), *overrides]) == 0
    (run_dir,) = save_dir.iterdir()
    assert len(list(run_dir.glob("samples_*"))) == 6
    assert_same_end(run_dir, whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--loss.sparsity.coeff", "2"], "loss.sparsity.coeff: 2.0 instead of 0.01; remove the"),
        (["--decoder_bias", "mean"], 'decoder_bias: "mean" instead of null; remove the'),
        (["--n_samples", "12"], "n_samples (12) must be at least 16, since the run in"),
        (["--resume", "/nope"], "resume: there is no folder '/nope'; give the folder of a run"),
        (["--save_dir", "null"], "save_every_n_samples (8) needs a save_dir"),
    ],
)
def test_what_does_not_go_on_is_refused_and_changes_nothing(
    overrides: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = stop_in_batch(3, config)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    assert main([str(config), "--resume", str(run_dir), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def test_there_is_no_newest_run(config: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(config), "--resume"]) == 2
    assert "has a checkpoint to resume from; start one without resume" in capsys.readouterr().err
