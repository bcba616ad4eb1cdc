import re

import pytest
import torch

from sparsify.saes.build import build_sae
from sparsify.saes.config import MatryoshkaSAEConfig
from sparsify.saes.matryoshka import MatryoshkaSAE
from sparsify.settings.base_config import UserError


def test_outputs_match_hand_computation():
    # Centred input (3, 7) - (1, 2) = (2, 5), pre-activations (2, 5, 3) and c = (2, 5, 3). All stand
    # for 2 (1, 0) + 5 (0.6, 0.8) + 3 (0, 1) + (1, 2) = (6, 9), the first alone for (3, 2) and the
    # first two for (6, 6).
    sae = MatryoshkaSAE(d_act=2, n_dict=3, k=3, prefix_sizes=[1, 2])
    sae.load_state_dict(
        {
            "encoder.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
            "encoder.bias": torch.tensor([0.0, 0.0, -4.0]),
            "decoder.weight": torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.8, 1.0]]),
            "decoder.bias": torch.tensor([1.0, 2.0]),
            "threshold": torch.tensor(-1.0),
        }
    )
    acts = sae(torch.tensor([[3.0, 7.0]]))
    torch.testing.assert_close(acts.c, torch.tensor([[2.0, 5.0, 3.0]]))
    torch.testing.assert_close(acts.output, torch.tensor([[6.0, 9.0]]))
    torch.testing.assert_close(sae.other_output(acts, 0), torch.tensor([[3.0, 2.0]]))
    torch.testing.assert_close(sae.other_output(acts, 1), torch.tensor([[6.0, 6.0]]))
    assert sae.other_weights == (1.0, 1.0)


@pytest.mark.parametrize(("index", "size"), [(0, 1), (1, 4), (2, 11)])
def test_a_prefix_stands_for_what_it_does_without_later_elements(index: int, size: int):
    sae = MatryoshkaSAE(d_act=4, n_dict=12, k=5, prefix_sizes=[1, 4, 11])
    with torch.no_grad():
        sae.decoder.bias.normal_()
    acts = sae(torch.randn(2, 3, 4))
    c = acts.c.clone()
    c[..., size:] = 0.0
    output = sae.other_output(acts, index)
    torch.testing.assert_close(output, sae.decode(c))

    gradient = torch.autograd.grad(output.square().sum(), sae.decoder.elements)[0]
    assert gradient[:size].any()
    assert not gradient[size:].any()


def test_prefixes_are_shares_of_the_dictionary():
    config = MatryoshkaSAEConfig(dict_size_to_input_ratio=4.0, k=2, prefix_shares=[0.1, 0.25, 0.5])
    sae = build_sae(config, d_act=8)
    assert isinstance(sae, MatryoshkaSAE)
    assert sae.prefix_sizes == [3, 8, 16]  # of 32, rounded down


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.5, 0.25], "prefix_shares\n.*must ascend"),
        ([0.5, 0.5], "prefix_shares\n.*must ascend"),
        ([0.5, 1.0], "less than 1"),
        ([], "at least 1 item"),
    ],
)
def test_bad_shares_are_rejected(shares: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        MatryoshkaSAEConfig(dict_size_to_input_ratio=4.0, k=2, prefix_shares=shares)


@pytest.mark.parametrize(("shares", "sizes"), [([0.01, 0.5], "[0, 16]"), ([0.5, 0.51], "[16, 16]")])
def test_prefixes_of_too_few_elements_are_rejected(shares: list[float], sizes: str):
    config = MatryoshkaSAEConfig(dict_size_to_input_ratio=4.0, k=2, prefix_shares=shares)
    with pytest.raises(UserError, match=re.escape(f"of 32 dictionary elements are {sizes}, which")):
        build_sae(config, d_act=8)
