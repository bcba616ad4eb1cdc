import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsify import SAETransformer
from sparsify.losses.total import MeanLoss, mean_losses
from sparsify.runs import sinks
from sparsify.scripts.train_tlens_saes.run_train_tlens_saes import main
from sparsify.scripts.train_tlens_saes.sae_run import SAERun
from sparsify.settings.base_config import UserError
from sparsify.training import sae_trainer

from .conftest import write_yaml

POSITION = "blocks.1.hook_resid_pre"


@pytest.fixture
def config(sae_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {
        **sae_settings,
        "lr_schedule": "constant",
        "eval_every_n_samples": 16,
        "save_every_n_samples": 16,
        "collect_act_frequency_every_n_samples": 8,
        "act_frequency_n_tokens": 64,
        "save_dir": str(tmp_path / "out"),
    }


def run(config: dict[str, Any], tmp_path: Path, *overrides: str) -> int:
    return main([str(write_yaml(tmp_path / "config.yaml", config)), *overrides])


def run_dir_of(config: dict[str, Any]) -> Path:
    (run_dir,) = Path(config["save_dir"]).iterdir()
    return run_dir


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.model
def test_a_run_learns_evaluates_and_can_be_loaded(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(config, tmp_path) == 0
    run_dir = run_dir_of(config)
    metrics = read_metrics(run_dir)
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < losses[0]
    evaluated = [m["n_samples"] for m in metrics if "performance/eval/ce_loss" in m]
    assert evaluated == [0, 16, 24]
    # Counted over training tokens, besides what every evaluation counts.
    counts = [m for m in metrics if f"sparsity/alive_dict_elements/{POSITION}" in m]
    assert len(counts) > len(evaluated)
    assert {path.name for path in run_dir.iterdir()} == {
        ".lock",
        *("checkpoint_16.json", "checkpoint_24.json", "state_16.pt", "state_24.pt"),
        "eval.json",
        "final_config.yaml",
        "metrics.jsonl",
        "samples_16.safetensors",
        "samples_24.safetensors",
        "training.png",
    }
    saved = load_file(run_dir / "samples_24.safetensors")
    model = SAETransformer.from_local_path(run_dir)
    for name, tensor in model.saes.state_dict().items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0)
    printed = capsys.readouterr().out
    assert "CE loss" in printed
    assert f'SAETransformer.from_local_path("{run_dir}")' in printed


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    "loss",
    [
        {"sparsity": {"coeff": 0.01}, "out_to_in": {"coeff": 1.0}},
        {
            "sparsity": {"coeff": 0.01},
            "logits_kl": {"coeff": 0.5},
            "in_to_orig": {"hook_positions": ["blocks.2.hook_resid_post"], "total_coeff": 1.0},
        },
    ],
    ids=["local", "e2e + downstream"],
)
def test_the_other_mixes_train_several_saes(
    config: dict[str, Any], loss: dict[str, Any], tmp_path: Path
):
    config |= {"loss": loss, "saes": {**config["saes"], "sae_positions": ["hook_resid_pre"]}}
    assert run(config, tmp_path) == 0
    metrics = read_metrics(run_dir_of(config))
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < losses[0]
    assert f"sparsity/eval/L_0/{POSITION}" in metrics[-1]
    assert "sparsity/eval/L_0/blocks.2.hook_resid_pre" in metrics[-1]


@pytest.mark.slow
@pytest.mark.model
def test_same_config_same_losses(config: dict[str, Any], tmp_path: Path):
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        assert run(config, tmp_path, "--save_dir", str(out)) == 0
    first, second = (read_metrics(next(out.iterdir())) for out in outs)
    assert first == second


@pytest.mark.slow
@pytest.mark.model
def test_data_that_end_early_are_trained_on_and_it_is_said(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(config, tmp_path, "--n_samples", "100000") == 0
    metrics = read_metrics(run_dir_of(config))
    n_trained = metrics[-1]["n_samples"]
    assert 24 < n_trained < 100_000
    assert any("train_data_ended_early" in line for line in metrics)
    assert f"train_data: ended after {n_trained:,} of 100,000 samples" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.model
def test_a_loss_that_is_not_finite_ends_the_run(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(config, tmp_path, "--lr", "1e38", "--save_every_n_samples", "null") == 2
    run_dir = run_dir_of(config)
    path = run_dir / "bad_batch_8.safetensors"
    assert re.search(
        r"error: loss/train/\S+ is (nan|inf) after 8 samples. The batch, whose tokens are in "
        rf"{re.escape(str(path))}, has not been trained on; set max_grad_norm",
        capsys.readouterr().err,
    )
    assert load_file(path)["tokens"].shape == (4, 16)
    names = {path.name for path in run_dir.iterdir()}
    assert names == {".lock", "final_config.yaml", "metrics.jsonl", path.name}


@pytest.mark.slow
@pytest.mark.model
def test_a_gradient_that_is_not_finite_is_not_stepped_with(
    config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def steep_losses(*args: Any) -> tuple[list[MeanLoss], dict[str, Tensor]]:
        (loss,), terms = mean_losses(*args)
        loss.mean.register_hook(lambda grad: grad * torch.inf)
        return [loss], terms

    monkeypatch.setattr(sae_trainer, "mean_losses", steep_losses)
    assert run(config, tmp_path) == 2
    assert re.search(
        r"grad_norm is (nan|inf) after 4 samples, before the optimizer step; set max_grad_norm and",
        capsys.readouterr().err,
    )


@pytest.mark.slow
@pytest.mark.model
def test_an_interrupted_run_keeps_what_it_learned(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    evaluate = SAERun.evaluate

    def interrupt(run: SAERun) -> dict[str, float]:
        if run.n_samples > 0:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(run)

    monkeypatch.setattr(SAERun, "evaluate", interrupt)
    assert run(config, tmp_path, "--save_every_n_samples", "null") == 130
    assert (run_dir_of(config) / "samples_16.safetensors").exists()


@pytest.mark.slow
@pytest.mark.model
def test_a_run_that_is_refused_before_its_first_step_leaves_nothing(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise UserError("wandb_project: no run could be started")

    monkeypatch.setattr(sinks.WandbSink, "__init__", refuse)
    assert run(config, tmp_path, "--wandb_project", "p") == 2
    assert list(Path(config["save_dir"]).iterdir()) == []


@pytest.mark.slow
@pytest.mark.model
def test_a_run_without_a_folder_does_not_claim_to_save(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    overrides = ["--save_dir", "null", "--save_every_n_samples", "null"]
    assert run(config, tmp_path, *overrides) == 0
    printed = capsys.readouterr()
    assert "CE loss" in printed.out
    assert "saved" not in printed.err


BAD_INPUT = [
    ({"n_sample": 8}, "unknown key 'n_sample'; did you mean 'n_samples'?"),
    ({"loss.sparsty": {"coeff": 1}}, "unknown key 'sparsty'; did you mean 'sparsity'?"),
    ({"loss": {}}, "loss: has no term"),
    ({"batch_size": 3}, "effective_batch_size (8) must be a multiple of batch_size (3)"),
    ({"saes.sae_positions": ["blocks.1.hook_resid_per"]}, "did you mean 'blocks.1.hook_resid_pre'"),
    ({"saes.sae_positions": [POSITION, POSITION]}, f"'{POSITION}' is repeated; name it once"),
    ({"saes.sae_positions": ["blocks.1.attn.hook_pattern"]}, "an SAE needs one vector per token"),
    ({"train_data.n_ctx": 17}, "n_ctx: 17 is beyond the model's context of 16"),
    ({"train_data.dataset_name": "./nothing.parquet"}, "there is no file or folder"),
    ({"train_data.dataset_name": "EMPTY"}, "is empty"),
    ({"train_data.dataset_name": "TABLE"}, "has no column 'text'; set it to one of code"),
    (
        {
            "train_data.dataset_name": "TABLE",
            "train_data.column_name": "code",
            "train_data.is_tokenized": True,
        },
        "holds text, not lists of token ids",
    ),
    ({"tlens_model_path": "nowhere"}, "tlens_model_path: 'nowhere' has no config.json"),
    ({"tlens_model_name": "tiny-python"}, "give either tlens_model_name or tlens_model_path"),
    ({"saes.pretrained_sae_paths": ["nothing.safetensors"]}, "there is no such file"),
    ({"save_dir": "FILE/out"}, "save_dir: cannot write to"),
    ({"eval_data": None}, "eval_every_n_samples (16) needs eval_data"),
    (
        {"loss.in_to_orig": {"hook_positions": ["blocks.0.hook_resid_mid"], "total_coeff": 1}},
        "does not lie behind the first SAE",
    ),
    ({"device": "cuda"}, "device: torch sees no 'cuda'"),
    (
        {"collect_act_frequency_every_n_samples": None},
        "act_frequency_n_tokens (64) has no effect while collect_act_frequency_every_n_samples",
    ),
]  # fmt: skip


@pytest.mark.model
@pytest.mark.parametrize(("changes", "message"), BAD_INPUT, ids=[m for _, m in BAD_INPUT])
def test_bad_input_gets_one_message_and_leaves_nothing(
    config: dict[str, Any],
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "EMPTY.txt").write_text("")
    (tmp_path / "TABLE.jsonl").write_text('{"code": "x = 1"}\n')
    if torch.cuda.is_available() and changes.get("device") == "cuda":
        return
    named = {"EMPTY": "EMPTY.txt", "TABLE": "TABLE.jsonl", "FILE/out": "FILE/out"}
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place[parent] = place = dict(place[parent])
        place[last] = str(tmp_path / named[value]) if str(value) in named else value
    assert run(config, tmp_path) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("error:") == 1
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["SCRIPTS/tiny_python_e2e.yaml", "--lr", "fast"]]
)
def test_help_and_errors_come_without_torch(arguments: list[str]):
    import sparsify.scripts.train_tlens_saes as scripts

    folder = scripts.__path__[0]
    script = f"{folder}/run_train_tlens_saes.py"
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[script, *(a.replace('SCRIPTS', folder) for a in arguments)]!r}\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    print('exit', exit.code, 'torch' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith(f"exit {2 if 'fast' in arguments else 0} False\n")
