"""No file allows code to be executed: the caller does, or nobody."""

from pathlib import Path
from typing import Any

import pytest

from sparsify.runs.config import SAETransformerConfig
from sparsify.scripts.cli import training_scripts
from sparsify.scripts.evaluate.run_evaluate import parse
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.settings.base_config import UserError, dump_yaml, read_yaml, validate_config
from sparsify.settings.command_line import load_config
from sparsify.sweeps.sweep import load_sweep

RECIPE = """
tlens_model_name: gpt2-small
n_samples: 8
batch_size: 4
lr: 0.1
loss: {sparsity: {coeff: 1.0}, out_to_in: {coeff: 1.0}}
saes: {sae_positions: [blocks.1.hook_resid_pre], dict_size_to_input_ratio: 2.0}
train_data: {dataset_name: python-stdlib, n_ctx: 8}
eval_data: {dataset_name: python-stdlib, split: validation, n_ctx: 8}
"""
REFUSED = r"trust_remote_code: no file can allow code .* give --trust_remote_code true on the comm"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    return Path("recipe.yaml")


@pytest.mark.parametrize("value", ["true", "yes", "1", "'on'", "null", "[true]"])
def test_a_file_that_trusts_is_refused(value: str, recipe: Path):
    recipe.write_text(f"{RECIPE}\ntrust_remote_code: {value}\n")
    for arguments in ([], ["--trust_remote_code", "true"]):
        with pytest.raises(UserError, match=REFUSED):
            load_config(Config, [str(recipe), *arguments], "")


def test_the_command_line_trusts_and_nothing_remembers(recipe: Path):
    config = load_config(Config, [str(recipe), "--trust_remote_code", "true"], "")
    assert config.trust_remote_code
    assert "trust_remote_code" not in dump_yaml(config)
    recipe.write_text(dump_yaml(config))
    assert not validate_config(Config, read_yaml(recipe), "kept").trust_remote_code
    assert "trust_remote_code" in SAETransformerConfig.model_fields


def test_a_file_may_say_that_it_does_not_trust(recipe: Path):
    """As configs of runs from before do."""
    recipe.write_text(f"{RECIPE}\ntrust_remote_code: false\n")
    assert not load_config(Config, [str(recipe)], "").trust_remote_code


SWEEPS = {
    "top": "recipe: recipe.yaml\nparameters: {seed: {values: [1, 2]}}\ntrust_remote_code: true",
    "parameter": "recipe: recipe.yaml\nparameters: {trust_remote_code: {value: true}}",
    "run": "recipe: recipe.yaml\nruns: {a: {trust_remote_code: true}}",
    "name with a value": 'recipe: recipe.yaml\nruns: {a: {"trust_remote_code=true --x": 1}}',
    "command": (
        "program: run_train_tlens_saes.py\nparameters: {seed: {values: [1, 2]}}\n"
        'command: ["${program}", recipe.yaml, --trust_remote_code, "true", "${args}"]'
    ),
}


@pytest.mark.parametrize("content", SWEEPS.values(), ids=SWEEPS)
def test_a_sweep_file_does_not_trust(content: str, recipe: Path):
    Path("sweep.yaml").write_text(content)
    with pytest.raises(UserError, match=REFUSED):
        load_sweep(Path("sweep.yaml"), training_scripts().values())


def test_the_command_line_of_a_sweep_trusts_for_all_runs(recipe: Path):
    Path("sweep.yaml").write_text("recipe: recipe.yaml\nparameters: {seed: {values: [1, 2]}}")
    scripts = training_scripts().values()
    jobs = load_sweep(Path("sweep.yaml"), scripts, ["--trust_remote_code", "true"])
    trusted: list[Any] = [job.config for job in jobs]
    assert [config.trust_remote_code for config in trusted] == [True, True]
    # A run is known by its config, whoever trusts its model.
    untrusting = load_sweep(Path("sweep.yaml"), scripts)
    assert [job.key for job in jobs] == [job.key for job in untrusting]


def test_an_evaluation_trusts_by_its_command_line():
    assert parse(["run"]).trust_remote_code == "false"
    assert parse(["run", "--trust_remote_code", "true"]).trust_remote_code == "true"
