from pathlib import Path
from typing import Any

import pytest

from sparsify.runs.config import PLACED, SAETransformerConfig
from sparsify.saes.config import ReLUSAEConfig, TopKSAEConfig
from sparsify.settings.base_config import dump_yaml
from sparsify.settings.command_line import load_config

SAES: dict[str, Any] = {"sae_positions": ["hook_resid_pre"], "dict_size_to_input_ratio": 2}


def test_one_name_stands_for_a_list():
    fields = {"sae_positions": "hook_z", "pretrained_sae_paths": "a/b.pt"}
    config = PLACED["relu"].model_validate(SAES | fields)
    assert config.sae_positions == ["hook_z"]
    assert config.pretrained_sae_paths == [Path("a/b.pt")]


def test_ratio_goes_to_the_sae():
    config = PLACED["relu"].model_validate(SAES | {"dict_size_to_input_ratio": 1.5})
    assert isinstance(config, ReLUSAEConfig)
    assert config.dict_size_to_input_ratio == 1.5


@pytest.mark.parametrize("model", [{"tlens_model_name": "gpt2"}, {"tlens_model_path": "a/b"}])
def test_config_reads_back_equal(model: dict[str, str]):
    import yaml

    config = SAETransformerConfig.model_validate({**model, "saes": SAES})
    assert config.tlens_model_processing == "folded"
    assert SAETransformerConfig.model_validate(yaml.safe_load(dump_yaml(config))) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sae_positions": []}, "names no hook point"),
        ({"sae_positions": ["a", "b", "a"]}, "'a' is repeated; name it once"),
        ({"dict_size_to_input_ratio": 0}, "greater than 0"),
        ({"dict_size_to_input_ratio": float("inf")}, "finite"),
        ({"retrain_saes": True}, "retrain_saes is true, but there are no pretrained_sae_paths"),
        ({"sae_position": "a"}, "unknown key 'sae_position'; did you mean 'sae_positions'"),
    ],
)
def test_bad_saes_are_rejected(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        PLACED["relu"].model_validate(SAES | fields)


def test_help_says_which_kinds_a_setting_belongs_to(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        load_config(SAETransformerConfig, ["--help"], "")
    said = " ".join(capsys.readouterr().out.split())
    assert f"--saes.kind {{{','.join(PLACED)}}} One of these kinds. (default: relu)" in said
    assert "--saes.bandwidth float Kind jumprelu: Width of the window" in said
    assert "--saes.sae_positions str [str ...] Hook points" in said


def test_a_kind_and_its_settings_can_be_chosen_on_the_command_line(tmp_path: Path):
    path = tmp_path / "config.yaml"
    saes = PLACED["relu"].model_validate(SAES)
    path.write_text(dump_yaml(SAETransformerConfig(tlens_model_name="gpt2", saes=saes)))
    config = load_config(
        SAETransformerConfig, [str(path), "--saes.kind", "topk", "--saes.k", "3"], ""
    )
    assert isinstance(config.saes, TopKSAEConfig)
    assert config.saes.k == 3


@pytest.mark.parametrize("fields", [{}, {"tlens_model_name": "gpt2", "tlens_model_path": "a"}])
def test_there_must_be_one_model(fields: dict[str, str]):
    with pytest.raises(ValueError, match="give either tlens_model_name or tlens_model_path"):
        SAETransformerConfig.model_validate({**fields, "saes": SAES})
