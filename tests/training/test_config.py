from typing import Any

import pytest

from sparsify.settings.base_config import dump_yaml
from sparsify.training.config import TrainingConfig

FIELDS: dict[str, Any] = {"n_samples": 64, "batch_size": 4, "lr": 1e-3}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_samples": 0}, "greater than 0"),
        ({"lr": 0.0}, "greater than 0"),
        (
            {"effective_batch_size": 6},
            r"effective_batch_size \(6\) must be a multiple of batch_size \(4\)",
        ),
        (
            {"effective_batch_size": 2},
            r"effective_batch_size \(2\) must be a multiple of batch_size \(4\)",
        ),
        ({"n_samples": 3}, r"n_samples \(3\) must be at least one effective batch \(4\)"),
        ({"warmup_samples": 64}, r"warmup_samples \(64\) must be below n_samples \(64\)"),
        (
            {"lr_schedule": "linear", "warmup_samples": 40, "cooldown_samples": 25},
            r"warmup_samples \(40\) and cooldown_samples \(25\) must together be at most",
        ),
        ({"wandb_project": "a/b"}, "the name of a project holds no '/'; give the project alone"),
        ({"wandb_project": "a" * 129}, "the name of a project has at most 128 characters"),
        ({"lr_schedule": "linear"}, "so it never falls; set cooldown_samples"),
        ({"cooldown_samples": 8}, r"cooldown_samples \(8\) belongs to lr_schedule 'linear'"),
        ({"cooldown_samples": None}, r"cooldown_samples \(None\) belongs to lr_schedule 'linear'"),
        (
            {"lr_schedule": "constant", "min_lr_factor": 0.5},
            r"min_lr_factor \(0.5\) is not used by lr_schedule 'constant'",
        ),
        ({"min_lr_factor": 1.5}, "less than or equal to 1"),
        ({"max_grad_norm": 0.0}, "greater than 0"),
        (
            {"save_dir": None, "save_every_n_samples": 8},
            r"save_every_n_samples \(8\) needs a save_dir",
        ),
        ({"lr": float("inf")}, "finite number"),
        ({"max_grad_norm": float("nan")}, "finite number"),
        ({"seed": 2**63}, "less than 9223372036854775808"),
        ({"wandb_run_name": "a/b"}, "the run's name 'a/b' also names its folder"),
        ({"wandb_run_name_prefix": "../"}, "the run's name '../run' also names its folder"),
        ({"lr_shedule": "cosine"}, "unknown key 'lr_shedule'; did you mean 'lr_schedule'"),
    ],
)
def test_bad_settings_are_rejected(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TrainingConfig.model_validate(FIELDS | fields)


def test_counts_follow_from_the_batch_sizes():
    config = TrainingConfig.model_validate(FIELDS | {"n_samples": 70, "effective_batch_size": 16})
    assert config.n_accumulation_steps == 4
    assert config.n_steps == 4  # 70 // 16
    assert config.n_batches == 16


def test_effective_batch_is_the_batch_if_not_given():
    config = TrainingConfig.model_validate(FIELDS)
    assert (config.samples_per_step, config.n_accumulation_steps, config.n_steps) == (4, 1, 16)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_saved_config_loads_again(schedule: str):
    import yaml

    config = TrainingConfig.model_validate(FIELDS | {"lr_schedule": schedule})
    assert TrainingConfig.model_validate(yaml.safe_load(dump_yaml(config))) == config


class _ScriptConfig(TrainingConfig):
    words: str

    @property
    def default_run_name(self) -> str:
        return self.words


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "tiny"),
        ({"wandb_run_name": "a"}, "a"),
        ({"wandb_run_name": "a", "wandb_run_name_prefix": "p_"}, "p_a"),
        ({"wandb_run_name_prefix": "p_"}, "p_tiny"),
    ],
)
def test_run_name_is_the_given_or_the_scripts_behind_the_prefix(fields: dict[str, str], name: str):
    assert _ScriptConfig.model_validate(FIELDS | {"words": "tiny"} | fields).run_name == name


def test_a_scripts_own_name_must_name_a_folder_unless_another_is_given():
    with pytest.raises(ValueError, match="the run's name 'a/b' also names its folder"):
        _ScriptConfig.model_validate(FIELDS | {"words": "a/b"})
    _ScriptConfig.model_validate(FIELDS | {"words": "a/b", "wandb_run_name": "a"})
