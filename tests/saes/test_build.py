from typing import ClassVar, Literal

import pytest
import torch
from example_saes import IdentitySAE

from sparsify.losses.loss import LossConfig, check_loss_suits_kind
from sparsify.saes.base import SAE
from sparsify.saes.build import build_sae
from sparsify.saes.config import KINDS, ReLUSAEConfig, SAEConfig, kinds_where
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


class IdentityConfig(SAEConfig):
    """A kind that is not in the table, as one in a notebook."""

    kind: Literal["identity"] = "identity"
    has_pre_acts: ClassVar[bool] = False

    def build(self, d_act: int, n_dict: int, d_out: int | None) -> SAE:
        return IdentitySAE(d_act)


def test_a_kind_need_not_be_in_the_table_to_be_built():
    sae = build_sae(IdentityConfig(dict_size_to_input_ratio=2.0), d_act=3)
    x = torch.randn(4, 3)
    torch.testing.assert_close(sae(x).output, x)
    assert "identity" not in KINDS


def test_a_code_without_pre_activations_can_be_penalised_but_not_revived():
    sae = IdentityConfig(dict_size_to_input_ratio=2.0)
    check_loss_suits_kind(LossConfig.model_validate({"sparsity": {"coeff": 1.0}}), sae)
    with pytest.raises(ValueError, match="elements of kind 'identity' have no pre-activations"):
        check_loss_suits_kind(LossConfig.model_validate({"aux_k": {"coeff": 1.0}}), sae)


def test_kinds_are_named_by_what_they_allow():
    assert kinds_where(lambda kind: not kind.code_has_gradient) == "codebook"
    assert kinds_where(lambda kind: kind.has_thresholds) == "jumprelu"
    assert kinds_where(lambda kind: kind.reads_elsewhere) == "transcoder"
