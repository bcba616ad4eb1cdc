from pathlib import Path
from typing import Any

import pytest

from sparsify.base_config import dump_yaml
from sparsify.config import ReLUSAEs, SAETransformerConfig
from sparsify.saes.config import ReLUSAEConfig

SAES: dict[str, Any] = {"sae_positions": ["hook_resid_pre"], "dict_size_to_input_ratio": 2}


def test_one_name_stands_for_a_list():
    fields = {"sae_positions": "hook_z", "pretrained_sae_paths": "a/b.pt"}
    config = ReLUSAEs.model_validate(SAES | fields)
    assert config.sae_positions == ["hook_z"]
    assert config.pretrained_sae_paths == [Path("a/b.pt")]


def test_ratio_goes_to_the_sae():
    config = ReLUSAEs.model_validate(SAES | {"dict_size_to_input_ratio": 1.5})
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
        ReLUSAEs.model_validate(SAES | fields)


@pytest.mark.parametrize("fields", [{}, {"tlens_model_name": "gpt2", "tlens_model_path": "a"}])
def test_there_must_be_one_model(fields: dict[str, str]):
    with pytest.raises(ValueError, match="give either tlens_model_name or tlens_model_path"):
        SAETransformerConfig.model_validate({**fields, "saes": SAES})
