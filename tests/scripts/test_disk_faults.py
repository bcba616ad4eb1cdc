"""Runs that cannot write for a while, or not at all."""

import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sparsify.runs.checkpoints import load_checkpoint
from sparsify.runs.saver import CheckpointSaver
from sparsify.scripts.train_tlens_saes import run_train_tlens_saes
from sparsify.scripts.train_tlens_saes.run_train_tlens_saes import main
from sparsify.scripts.train_tlens_saes.sae_run import SAERun
from sparsify.training.sae_trainer import SAEBatchLoss

from .conftest import assert_same_end, run_in_one_piece, write_yaml

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.model]


@pytest.fixture(scope="module")
def content(sae_settings: dict[str, Any]) -> dict[str, Any]:
    return {**sae_settings, "save_every_n_samples": 4}


@pytest.fixture(scope="module")
def whole(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in_one_piece(content, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def config(content: dict[str, Any], tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "config.yaml", {**content, "save_dir": str(tmp_path / "out")})


@contextmanager
def quota(*limits: int | None) -> Iterator[None]:
    """For each batch of a run, the bytes to which files can then grow; None is no limit.

    It is lifted at the end of the block, as it is also that of the file to which pytest may write.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    batches = iter(limits)
    batch_loss, save = SAERun.batch_loss, CheckpointSaver.save

    def limited(run: SAERun, tokens: Tensor) -> SAEBatchLoss:
        limit = next(batches)
        resource.setrlimit(resource.RLIMIT_FSIZE, before if limit is None else (limit, before[1]))
        return batch_loss(run, tokens)

    def save_at_once(saver: CheckpointSaver, *args: Any) -> None:
        save(saver, *args)
        saver._wait()  # while the limit is that of its batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAERun, "batch_loss", limited)
        patch.setattr(CheckpointSaver, "save", save_at_once)
        patch.setattr("sparsify.runs.saver.RETRY_DELAYS_S", (0.0,))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_for_a_while_costs_those_checkpoints_alone(
    config: Path, whole: Path, capsys: pytest.CaptureFixture[str]
):
    with quota(None, 100, 2000, 2000, None, None):
        assert main([str(config)]) == 0
    printed = capsys.readouterr().err
    assert "metrics cannot be written to" in printed
    for n_samples in (8, 12, 16):
        assert f"warning: save_dir: the checkpoint after {n_samples} samples cannot be" in printed
    (run_dir,) = (config.parent / "out").iterdir()
    written = {path.name for path in run_dir.glob("samples_*")}
    assert written == {f"samples_{n_samples}.safetensors" for n_samples in (4, 20, 24)}
    assert_same_end(run_dir, whole, may_lack_weights=True)


def test_a_disk_that_stays_full_says_how_to_go_on(
    config: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("sys.argv", ["run_train_tlens_saes.py"])
    with quota(None, None, 100, 100, 100, 100):
        assert main([str(config)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    (run_dir,) = (config.parent / "out").iterdir()
    assert error.startswith(
        f"error: save_dir: the last steps could not be saved in '{run_dir}' (File too large); "
        "free some space or make it writable, then resume with: "
    )
    assert load_checkpoint(run_dir).n_samples == 8
    assert not list(run_dir.glob(".*.tmp"))
    assert main(shlex.split(error)[-2:]) == 0
    assert_same_end(run_dir, whole)


def test_a_folder_that_becomes_read_only_stops_no_training(config: Path, whole: Path):
    # Root may write anywhere, unless it has given that up.
    prefix = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    script = str(run_train_tlens_saes.__file__)
    command = [*prefix, sys.executable, script, str(config), "--n_samples", "400000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("saved" in line for line in lines)
        (run_dir,) = (config.parent / "out").iterdir()
        run_dir.chmod(0o555)
        assert any(
            "cannot be written to" in line and "(Permission denied)" in line for line in lines
        )
        run_dir.chmod(0o755)
        assert any("saved" in line for line in lines)
        process.terminate()
        assert "interrupted; resume with" in "".join(lines)
    assert process.returncode == 130
    assert not load_checkpoint(run_dir).damaged
