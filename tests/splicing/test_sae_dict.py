import pytest
import torch
from example_saes import IdentitySAE

from sparsify.splicing.sae_dict import SAEDict, position_of, sae_key

POSITION = "blocks.2.attn.hook_z"
KEY = "blocks-2-attn-hook_z"


def test_key_of_a_position_has_no_dot():
    assert sae_key(POSITION) == sae_key(KEY) == KEY
    assert position_of(KEY) == position_of(POSITION) == POSITION


@pytest.mark.parametrize("given", [POSITION, KEY])
def test_sae_is_found_by_its_position_and_by_its_key(given: str):
    sae, other = IdentitySAE(4), IdentitySAE(4)
    saes = SAEDict({given: sae})
    for name in (POSITION, KEY):
        assert name in saes
        assert saes[name] is saes.at(name) is sae
    assert list(saes) == list(saes.keys()) == [KEY]
    saes[POSITION] = other
    assert dict(saes.items()) == {KEY: other}
    del saes[given]
    assert POSITION not in saes
    assert KEY not in saes


def test_weights_are_named_by_keys():
    saes = SAEDict({POSITION: IdentitySAE(4)})
    saes[POSITION].register_buffer("scale", torch.ones(2))
    assert list(saes.state_dict()) == [f"{KEY}.scale"]


def test_missing_sae_is_an_error():
    with pytest.raises(KeyError, match="hook_embed"):
        SAEDict()["hook_embed"]
