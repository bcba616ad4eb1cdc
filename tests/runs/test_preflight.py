import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.data.config import DataConfig
from sparsify.data.loader import TokenLoader, build_loader
from sparsify.runs import preflight, text
from sparsify.runs.preflight import (
    check_wandb,
    run_checks,
    time_steps,
)
from sparsify.runs.text import check_long_enough
from sparsify.runs.training_run import OpeningStep
from sparsify.runs.wandb_sink import WandbSink
from sparsify.settings.base_config import UserError
from sparsify.training.config import TrainingConfig


def refuse() -> str:
    raise UserError("lr: is odd;\n  set it to 1")


def run_out_of_memory() -> str:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")


def config_of(**settings: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"n_samples": 64, "batch_size": 4, "lr": 1.0, **settings})


def test_table_goes_on_with_what_does_not_need_what_failed(capsys: pytest.CaptureFixture[str]):
    checks = [
        OpeningStep("lr", refuse),
        OpeningStep("model", lambda: "has 3 blocks"),
        OpeningStep("step", lambda: pytest.fail("was run"), needs=("model", "lr")),
        OpeningStep("speed", lambda: pytest.fail("was run"), needs=("step",)),
        OpeningStep("memory", run_out_of_memory, needs=("model",)),
    ]
    assert not run_checks(checks)
    assert capsys.readouterr().out.splitlines() == [
        "✗ lr      lr: is odd;",
        "            set it to 1",
        "✓ model   has 3 blocks",
        "– step    needs lr",
        "– speed   needs step",
        "✗ memory  device: out of memory (CUDA out of memory); lower the size of the model, the "
        "dictionary or the batch",
        "2 to change, 2 could not be checked",
    ]


def test_table_says_that_all_is_well(capsys: pytest.CaptureFixture[str]):
    assert run_checks([OpeningStep("model", lambda: "has 3 blocks")])
    assert capsys.readouterr().out == "✓ model  has 3 blocks\nall is well, nothing was trained\n"


# Weights & Biases


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"WANDB_API_KEY": "k" * 40}, "p: a key is in WANDB_API_KEY; it has not been tried"),
        ({"WANDB_MODE": "offline"}, "WANDB_MODE=offline: nothing is sent"),
        ({"NETRC": "FILE"}, "p: a key is in netrc for api.wandb.ai; it has not been tried"),
        ({}, "wandb_project: 'p' needs a key, and there is none; set WANDB_API_KEY in .env, or"),
    ],
)
def test_wandb_needs_a_key_or_to_be_offline(
    environment: dict[str, str], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "netrc"
    file.write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("FILE", str(file)))
    config = config_of(wandb_project="p")
    if environment:
        assert check_wandb(config) == found
    else:
        with pytest.raises(UserError, match=found):
            check_wandb(config)


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"[default]\nentity = me\nproject = p\n", None),
        (b"[default]\nbase_url = http://elsewhere\n", "sets base_url, and wandb would obey it"),
        (b"[default]\nentity = me\nx_service_transport = x\n", "sets x_service_transport"),
        (b"base_url = http://elsewhere\n", "sets something that cannot be read"),
        (b"\xff", "sets something that cannot be read"),
    ],
)
def test_a_file_of_wandb_in_the_working_directory_sends_no_key_elsewhere(
    folder: str,
    content: bytes,
    found: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "settings").write_bytes(content)
    config = config_of(wandb_project="p")
    if found is None:
        assert check_wandb(config).startswith("p: a key is in WANDB_API_KEY")
        return
    with pytest.raises(UserError, match=f"wandb_project: '{folder}/settings' {found}"):
        check_wandb(config)
    with pytest.raises(UserError, match=found):
        WandbSink(config, "run", None)


def test_without_a_wandb_project_no_key_is_needed():
    assert check_wandb(config_of()) == "no wandb_project, so nothing is sent"


# Length of the data


def ten_samples(folder: Path, n_epochs: int | None) -> tuple[DataConfig, TokenLoader]:
    path = folder / "ten.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [i, i, i]}) + "\n" for i in range(10)))
    data = DataConfig(dataset_name=str(path), is_tokenized=True, n_ctx=3, n_epochs=n_epochs)
    return data, build_loader(data, batch_size=2, tokenizer=None, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_epochs", "n_samples", "found"),
    [
        (1, 10, "at least 10 samples of 3 tokens, n_samples 10"),
        (3, 30, "at least 30 samples of 3 tokens in 3 epochs, n_samples 30"),
        (None, 99, "repeated without end"),
        (1, 12, r"holds 10 samples of 3 tokens, less than n_samples \(12\); set .*n_epochs to 2 o"),
        (2, 32, r"holds 20 samples of 3 tokens in 2 epochs, less than .*n_epochs to 4 or to null"),
    ],
)
def test_training_data_must_be_long_enough(
    n_epochs: int | None, n_samples: int, found: str, tmp_path: Path
):
    data, loader = ten_samples(tmp_path, n_epochs)
    if n_epochs and 10 * n_epochs < n_samples:
        with pytest.raises(UserError, match=found):
            check_long_enough(data, loader, n_samples)
    else:
        assert found in check_long_enough(data, loader, n_samples)


@pytest.mark.slow
def test_data_that_take_long_to_count_are_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text, "MAX_COUNT_SECONDS", -1)
    data, loader = ten_samples(tmp_path, 1)
    assert "at least 10 samples of 3 tokens (counted for" in check_long_enough(data, loader, 99)


# Speed


def test_hours_are_those_of_the_second_step(monkeypatch: pytest.MonkeyPatch):
    clock = iter([9.0, 11.0])
    monkeypatch.setattr(preflight.time, "monotonic", lambda: next(clock))
    config = TrainingConfig(n_samples=9100, batch_size=2, lr=1.0)
    found = time_steps(lambda: 0.5, config, n_samples_done=100)
    assert found.startswith("loss 0.5; a step takes 2 s, so about 2.5 h for 4,500 batches")
