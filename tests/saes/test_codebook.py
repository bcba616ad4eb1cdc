import copy

import pytest
import torch

from sparsify.saes.base import NewElements
from sparsify.saes.build import build_sae
from sparsify.saes.codebook import CodebookSAE
from sparsify.saes.config import CodebookSAEConfig


def tiny_sae() -> CodebookSAE:
    """Four codes of width two, with round numbers, of which two are added."""
    sae = build_sae(CodebookSAEConfig(dict_size_to_input_ratio=2.0, k=2), d_act=2)
    assert isinstance(sae, CodebookSAE)
    codes = torch.tensor([[10.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -1.0]])
    sae.load_state_dict({"codes": codes})
    return sae


def test_code_and_output_match_hand_computation():
    # Dot products of (1, 2) with the codes, over their lengths: (1, 2, 3 / sqrt 2, -2). The largest
    # are the second and third, where those of (10, 2, 3, -2) would be the first and third.
    # output = (0, 1) + (1, 1)
    acts = tiny_sae()(torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(acts.c, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    torch.testing.assert_close(acts.output, torch.tensor([[1.0, 2.0]]))


def test_gradients_reach_the_chosen_codes_and_straight_through_the_input():
    sae = tiny_sae()
    x = torch.tensor([[1.0, 2.0], [1.0, -3.0]], requires_grad=True)
    grad = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    acts = sae(x)  # the second token has the first and last code: (1, 3) against -3 and -2 / sqrt 2
    acts.output.backward(grad)
    torch.testing.assert_close(x.grad, grad)
    expected = torch.tensor([[5.0, 6.0], [3.0, 4.0], [3.0, 4.0], [5.0, 6.0]])
    torch.testing.assert_close(sae.codes.grad, expected)
    assert not acts.c.requires_grad


def test_codes_that_no_token_chose_have_no_gradient():
    sae = tiny_sae()
    sae(torch.tensor([[1.0, 2.0], [2.0, 4.1]])).output.sum().backward()
    assert sae.codes.grad is not None
    assert sae.codes.grad.any(dim=1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("k", [1, 3, 12])
def test_the_k_most_similar_codes_are_added(k: int):
    sae = CodebookSAE(d_act=4, n_dict=12, k=k)
    x = torch.randn(2, 5, 4)
    similarity = torch.cosine_similarity(x[..., None, :], sae.codes, dim=-1)
    largest = similarity.topk(k).values[..., -1:]
    acts = sae(x)
    torch.testing.assert_close(acts.c, (similarity >= largest).float())
    torch.testing.assert_close(acts.output, acts.c @ sae.codes)


def test_encoding_and_decoding_are_the_forward_pass():
    sae, x = CodebookSAE(d_act=4, n_dict=12, k=3), torch.randn(2, 5, 4)
    acts = sae(x)
    torch.testing.assert_close(sae.encode(x), acts.c, rtol=0, atol=0)
    torch.testing.assert_close(sae.decode(acts.c), acts.output)


def test_the_length_of_the_input_does_not_matter():
    sae, x = CodebookSAE(d_act=4, n_dict=12, k=3), torch.randn(6, 4)
    torch.testing.assert_close(sae.encode(8 * x), sae.encode(x), rtol=0, atol=0)


def test_a_sum_of_codes_starts_with_about_length_one():
    sae = CodebookSAE(d_act=256, n_dict=512, k=16)
    sums = sae.codes.view(32, 16, 256).sum(dim=1)
    assert sums.norm(dim=1).mean().item() == pytest.approx(1.0, abs=0.05)


def test_dict_elements_are_the_codes_of_unit_norm():
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5], [0.0, -1.0]])
    torch.testing.assert_close(tiny_sae().dict_elements, expected)


def test_reset_codes_point_to_their_targets_and_leave_the_others_as_they_are():
    sae = tiny_sae()
    before = copy.deepcopy(sae.codes)
    targets = torch.tensor([[3.0, 4.0], [-8.0, 6.0]])
    sae.reset_elements(
        NewElements(torch.tensor([3, 0]), torch.randn(2, 2), targets, torch.zeros(2))
    )
    length = (1 + 2**0.5) / 2  # the mean of (0, 1) and (1, 1)
    expected = length * torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    torch.testing.assert_close(sae.codes[[3, 0]], expected)
    assert torch.equal(sae.codes[1:3], before[1:3])
    assert [id(p) for p in sae.element_parameters()] == [id(sae.codes)]
