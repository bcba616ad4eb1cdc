import pytest
import torch

from sparsify.saes.build import build_sae
from sparsify.saes.config import GroupMaxSAEConfig
from sparsify.saes.groupmax import GroupMaxSAE
from sparsify.settings.base_config import UserError


def test_code_output_and_gradients_match_hand_computation():
    # Groups are elements 0, 1 and 2, 3. x = (1, 2): pre-activations 1, 2 and -1, -2, so element 1
    # is active with 2 and the second group, without a positive entry, has none.
    sae = build_sae(GroupMaxSAEConfig(dict_size_to_input_ratio=2.0, k=2), d_act=2)
    assert isinstance(sae, GroupMaxSAE)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    with torch.no_grad():
        sae.affine.weight.copy_(rows)
        sae.decoder.elements.copy_(rows)
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    acts = sae(x)
    torch.testing.assert_close(acts.c, torch.tensor([[0.0, 2.0, 0.0, 0.0]]))
    torch.testing.assert_close(acts.output, torch.tensor([[0.0, 2.0]]))
    acts.c.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 1.0]]))
    expected = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(sae.affine.weight.grad, expected)


def test_groups_have_one_size():
    with pytest.raises(
        UserError, match=r"saes\.k \(3\) must divide the number of dictionary eleme"
    ):
        build_sae(GroupMaxSAEConfig(dict_size_to_input_ratio=2.0, k=3), d_act=4)
