"""`--dry-run` of the training scripts."""

from pathlib import Path
from typing import Any

import pytest

from sparsify.scripts.train_tlens.run_train_tlens import main as train_lm
from sparsify.scripts.train_tlens_saes.run_train_tlens_saes import main as train_saes

from .conftest import write_yaml

pytestmark = [pytest.mark.slow, pytest.mark.model]


@pytest.fixture
def content(sae_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {**sae_settings, "save_dir": str(tmp_path / "out"), "save_every_n_samples": 8}


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines_by_name(printed: str) -> dict[str, str]:
    """The table: mark and text by the name of the check."""
    lines = [line.split(maxsplit=2) for line in printed.splitlines()[:-1]]
    return {name: f"{mark} {text}" for mark, name, text in lines}


def test_all_is_well_and_nothing_is_left(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_yaml(tmp_path / "config.yaml", content)
    before = files_in(tmp_path)
    assert train_saes([str(config), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    found = lines_by_name(printed)
    assert list(found) == [
        *("config", "save_dir", "wandb", "model", "SAEs", "loss", "tokenizer", "train_data"),
        *("eval_data", "disk", "memory", "step"),
    ]
    assert all(line.startswith("✓") for line in found.values())
    assert "24 samples in 3 optimizer steps of 8" in found["config"]
    assert "blocks.1.hook_resid_pre (32 elements of 8): 552 parameters" in found["SAEs"]
    assert "of 3 blocks, 3 are run, the first 1 once" in found["loss"]
    assert "280 tokens of a vocabulary of 300" in found["tokenizer"]
    assert "8 samples, eval_n_samples 8" in found["eval_data"]
    assert "3 checkpoints" in found["disk"]
    assert "for 6 batches" in found["step"]
    assert printed.endswith("all is well, nothing was trained\n")
    assert files_in(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_all_that_is_to_be_changed_is_said_at_once(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    content |= {
        "save_dir": str(tmp_path / "file" / "out"),
        "n_samples": 100_000,
        "saes": {**content["saes"], "sae_positions": ["blocks.1.hook_resid_per"]},
        "eval_data": {"dataset_name": "./nothing.parquet", "n_ctx": 16},
    }
    config = write_yaml(tmp_path / "config.yaml", content)
    assert train_saes([str(config), "--dry-run"]) == 2
    printed = capsys.readouterr()
    found = lines_by_name(printed.out)
    assert found["save_dir"].startswith("✗ save_dir: cannot write to")
    assert "did you mean 'blocks.1.hook_resid_pre'" in found["SAEs"]
    assert "less than n_samples (100,000); set train_data.n_epochs to" in found["train_data"]
    assert "there is no file or folder './nothing.parquet'" in found["eval_data"]
    assert found["model"].startswith("✓")
    assert found["loss"] == "– needs SAEs"
    assert found["disk"] == "– needs save_dir, SAEs"
    assert found["memory"] == "– needs SAEs, loss, train_data, eval_data"
    assert found["step"] == "– needs memory"
    assert printed.out.endswith("4 to change, 4 could not be checked\n")
    assert "Traceback" not in printed.out + printed.err


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"tlens_model_path": "nowhere"}, "model", "'nowhere' has no config.json"),
        ({"train_data.tokenizer_name": "tiny-python"}, "tokenizer", "ids up to 4095, but the mode"),
        ({"train_data.n_ctx": 17}, "train_data", "n_ctx: 17 is beyond the model's context of 16"),
        (
            {"loss.in_to_orig": {"hook_positions": ["blocks.0.hook_resid_mid"], "total_coeff": 1}},
            "loss",
            "does not lie behind the first SAE",
        ),
        ({}, "memory", "but 0 MB are free; lower batch_size (keep effective_batch_size), "),
    ],
    ids=["model", "tokenizer", "train_data", "loss", "memory"],
)
def test_each_check_says_what_to_change(
    content: dict[str, Any],
    changes: dict[str, Any],
    name: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    if name == "memory":
        monkeypatch.setattr("sparsify.runs.preflight.free_memory", lambda _: 1000)
    for key, value in changes.items():
        place, _, last = key.rpartition(".")
        if place:
            content[place] = {**content[place], last: value}
        else:
            content[last] = value
    config = write_yaml(tmp_path / "config.yaml", content)
    assert train_saes([str(config), "--dry-run"]) == 2
    found = lines_by_name(capsys.readouterr().out)
    assert message in found[name]
    assert [name for name, line in found.items() if line.startswith("✗")] == [name]


def test_a_run_that_goes_on_is_checked_and_not_touched(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_yaml(tmp_path / "config.yaml", content)
    assert train_saes([str(config), "--n_samples", "16"]) == 0
    save_dir = ("--save_dir", str(content["save_dir"]))
    before = files_in(tmp_path)
    capsys.readouterr()
    assert train_saes(["--resume", "--n_samples", "32", "--dry-run", *save_dir]) == 0
    found = lines_by_name(capsys.readouterr().out)
    assert found["resume"].endswith("resumes after 16 samples, with n_samples: 32 instead of 16")
    assert "2 checkpoints of" in found["disk"]
    assert "for 4 batches" in found["step"]
    assert train_saes(["--resume", "--dry-run", "--lr", "1", *save_dir]) == 2
    found = lines_by_name(capsys.readouterr().out)
    assert "lr: 1.0 instead of 0.01; remove the change" in found["resume"]
    assert found["memory"] == "– needs resume"
    assert files_in(tmp_path) == before


def test_a_run_whose_checkpoint_would_not_fit_is_not_started(
    content: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("sparsify.runs.disk._free_disk", lambda _: 1000)
    assert train_saes([str(write_yaml(tmp_path / "config.yaml", content))]) == 2
    assert "error: save_dir: the next checkpoint of the run would take" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_language_model_is_checked_too(
    lm_config: dict[str, Any], lm_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_yaml(tmp_path / "config.yaml", {**lm_config, "save_dir": str(tmp_path / "out")})
    before = files_in(tmp_path), files_in(lm_run)
    assert train_lm([str(config), "--dry-run"]) == 0
    found = lines_by_name(capsys.readouterr().out)
    assert "280 tokens of a vocabulary of 300" in found["tokenizer"]
    assert "for 6 batches" in found["step"]
    resume = ["--resume", str(lm_run / "samples_16.safetensors")]
    assert train_lm([str(config), "--dry-run", *resume]) == 0
    assert "resumes after 16 samples" in lines_by_name(capsys.readouterr().out)["resume"]
    wrong = ["--tokenizer.vocab_size", "100", "--eval_data.dataset_name", "./nothing.txt"]
    assert train_lm([str(config), "--dry-run", *wrong]) == 2
    found = lines_by_name(capsys.readouterr().out)
    assert "use at least 257" in found["tokenizer"]
    assert found["memory"] == "– needs tokenizer, train_data, eval_data"
    assert (files_in(tmp_path), files_in(lm_run)) == before
