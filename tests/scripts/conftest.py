"""A language model of a few thousand parameters, and its text."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

TEXT = "def double(number):\n    return 2 * number\n\n\nclass Node:\n    pass\n\n\n"


class _Dumper(yaml.SafeDumper):
    """Writes out what is used twice, where PyYAML would write an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper)


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(to_yaml(content))
    return path


def assert_same_end(run_dir: Path, whole: Path, *, may_lack_weights: bool = False) -> None:
    """Same weights and metrics, to the last bit; of all checkpoints, or of those that are there."""
    assert (run_dir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (run_dir / "eval.json").read_bytes() == (whole / "eval.json").read_bytes()
    for path in (run_dir if may_lack_weights else whole).glob("samples_*"):
        # Not byte by byte, since their headers are in no fixed order.
        torch.testing.assert_close(
            load_file(run_dir / path.name),
            load_file(whole / path.name),
            rtol=0,
            atol=0,
            msg=path.name,
        )


def run_in_one_piece(content: dict[str, Any], folder: Path) -> Path:
    """Folder of a run that trains SAEs and is not stopped."""
    from sparsify.scripts.train_tlens_saes.run_train_tlens_saes import main

    folder.mkdir(exist_ok=True)
    config = write_yaml(folder / "config.yaml", {**content, "save_dir": str(folder / "out")})
    assert main([str(config)]) == 0
    (run_dir,) = (folder / "out").iterdir()
    return run_dir


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for index in range(6):
        (folder / f"{index}.py").write_text(TEXT * 8 + f"print({index})\n")
    return folder


@pytest.fixture(scope="session")
def lm_config(text_folder: Path) -> dict[str, Any]:
    data = {"dataset_name": str(text_folder), "n_ctx": 16, "shuffle_block_samples": 16}
    return {
        "n_samples": 24,
        "batch_size": 4,
        "lr": 0.02,
        "adam_lr": 0.01,
        "lr_schedule": "constant",
        "log_every_n_grad_steps": 1,
        "eval_every_n_samples": 8,
        "eval_n_samples": 4,
        "save_every_n_samples": 8,
        "wandb_run_name": "tiny",
        "model": {
            "n_layers": 3,
            "d_model": 8,
            "n_heads": 2,
            "d_mlp": 16,
            "n_ctx": 16,
            "d_vocab": 300,
        },
        "tokenizer": {"vocab_size": 280},
        "train_data": {**data, "n_epochs": None},
        "eval_data": data,
        "prompts": ["def "],
    }


@pytest.fixture(scope="session")
def lm_run(lm_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a language model that was trained for 6 steps."""
    from sparsify.scripts.train_tlens.run_train_tlens import main

    folder = tmp_path_factory.mktemp("lm")
    config = write_yaml(folder / "config.yaml", lm_config)
    assert main([str(config), "--save_dir", str(folder / "out")]) == 0
    (run_dir,) = (folder / "out").iterdir()
    return run_dir


@pytest.fixture(scope="session")
def sae_settings(lm_run: Path, text_folder: Path) -> dict[str, Any]:
    """Six batches of 4 samples in three optimizer steps. Each test says how often things happen."""
    data = {"dataset_name": str(text_folder), "n_ctx": 16, "shuffle_block_samples": 16}
    return {
        "tlens_model_path": str(lm_run / "model"),
        "n_samples": 24,
        "batch_size": 4,
        "effective_batch_size": 8,
        "lr": 1e-2,
        "log_every_n_grad_steps": 1,
        "eval_n_samples": 8,
        "loss": {"sparsity": {"coeff": 0.01}, "logits_kl": {"coeff": 1.0}},
        "saes": {"sae_positions": ["blocks.1.hook_resid_pre"], "dict_size_to_input_ratio": 4.0},
        "train_data": data,
        "eval_data": data,
    }
