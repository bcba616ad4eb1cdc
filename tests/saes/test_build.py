import pytest
import torch

from sparsify.saes.build import build_sae
from sparsify.saes.config import ReLUSAEConfig
from sparsify.saes.relu import ReLUSAE
from sparsify.settings.base_config import UserError


def test_dictionary_size_is_rounded_down():
    sae = build_sae(ReLUSAEConfig(dict_size_to_input_ratio=2.5), d_act=3)
    assert isinstance(sae, ReLUSAE)
    assert (sae.d_act, sae.n_dict) == (3, 7)


def test_one_seed_gives_one_sae():
    config = ReLUSAEConfig(dict_size_to_input_ratio=2.0)
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(build_sae(config, d_act=3).state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_weights_load_into_an_sae_built_without_memory():
    config = ReLUSAEConfig(dict_size_to_input_ratio=2.0)
    trained = build_sae(config, d_act=3)
    with torch.device("meta"):
        loaded = build_sae(config, d_act=3)
    loaded.load_state_dict(trained.state_dict(), assign=True)
    x = torch.randn(4, 3)
    torch.testing.assert_close(loaded(x).output, trained(x).output, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dict_size_to_input_ratio": 0}, "greater than 0"),
        ({"dict_size_to_input_ratio": float("inf")}, "finite"),
        ({"dict_size_to_input_ratio": 1, "kind": "rely"}, "Input should be 'relu'"),
        ({"dict_size_to_input_ration": 1}, "did you mean 'dict_size_to_input_ratio'"),
    ],
)
def test_bad_config_is_rejected(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ReLUSAEConfig.model_validate(fields)


def test_a_ratio_that_leaves_no_element_is_rejected():
    config = ReLUSAEConfig(dict_size_to_input_ratio=0.1)
    with pytest.raises(UserError, match=r"dict_size_to_input_ratio: 0.1 of .* width 4 .* 0.25 or"):
        build_sae(config, d_act=4)
