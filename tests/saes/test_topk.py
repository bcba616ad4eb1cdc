import pytest
import torch

from sparsify.kernels import sparse
from sparsify.saes.build import build_sae
from sparsify.saes.config import (
    BatchTopKSAEConfig,
    CodebookSAEConfig,
    MatryoshkaSAEConfig,
    SAEConfig,
    TopKSAEConfig,
    TranscoderConfig,
)
from sparsify.saes.topk import TopKSAE, keep_largest
from sparsify.settings.base_config import UserError


def tiny_sae(k: int, multi_k: int | None = None) -> TopKSAE:
    """Four elements on activations of width two, with round numbers."""
    config = TopKSAEConfig(dict_size_to_input_ratio=2.0, k=k, multi_k=multi_k)
    sae = build_sae(config, d_act=2)
    assert isinstance(sae, TopKSAE)
    sae.load_state_dict(
        {
            "encoder.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]]),
            "encoder.bias": torch.tensor([0.0, 0.0, -4.0, 0.0]),
            "decoder.weight": torch.tensor([[1.0, 0.6, 0.0, 0.0], [0.0, 0.8, 1.0, 1.0]]),
            "decoder.bias": torch.tensor([1.0, 2.0]),
        }
    )
    return sae


def test_code_and_output_match_hand_computation():
    # Centred input (3, 7) - (1, 2) = (2, 5); pre-activations (2, 5, 2 + 5 - 4, -2) = (2, 5, 3, -2),
    # of which 5 and 3 are kept; output = 5 (0.6, 0.8) + 3 (0, 1) + (1, 2) = (4, 9).
    acts = tiny_sae(k=2)(torch.tensor([[3.0, 7.0]]))
    torch.testing.assert_close(acts.c, torch.tensor([[0.0, 5.0, 3.0, 0.0]]))
    torch.testing.assert_close(acts.output, torch.tensor([[4.0, 9.0]]))


def test_multi_topk_stands_for_more_entries_with_an_eighth_of_the_weight():
    # As above with 1 entry: c = (0, 5, 0, 0). The 3 largest are (2, 5, 3, 0), which stand for
    # 2 (1, 0) + 5 (0.6, 0.8) + 3 (0, 1) + (1, 2) = (6, 9).
    sae = tiny_sae(k=1, multi_k=3)
    acts = sae(torch.tensor([[3.0, 7.0]]))
    assert sae.other_weights == (1 / 8,)
    torch.testing.assert_close(acts.c, torch.tensor([[0.0, 5.0, 0.0, 0.0]]))
    torch.testing.assert_close(acts.output, torch.tensor([[4.0, 6.0]]))
    other = sae.other_output(acts, 0)
    torch.testing.assert_close(other, torch.tensor([[6.0, 9.0]]))
    other[0, 1].backward()  # trains the entries that are kept, each by what it adds: 0, 0.8 and 1
    torch.testing.assert_close(sae.affine.bias.grad, torch.tensor([0.0, 0.8, 1.0, 0.0]))


def test_without_multi_topk_there_is_no_other_output():
    assert tiny_sae(k=2).other_weights == ()


def test_negative_entries_are_not_kept():
    pre_acts = torch.tensor([[-1.0, 2.0, -3.0]])
    torch.testing.assert_close(keep_largest(pre_acts, 2), torch.tensor([[0.0, 2.0, 0.0]]))


@pytest.mark.parametrize("k", [1, 3, 9])
def test_each_token_has_k_entries_none_below_those_left_out(k: int):
    pre_acts = torch.rand(2, 5, 9) + 0.1
    c = keep_largest(pre_acts, k)
    is_kept = c > 0
    assert (is_kept.sum(dim=-1) == k).all()
    torch.testing.assert_close(c[is_kept], pre_acts[is_kept], rtol=0, atol=0)
    smallest_kept = c.where(is_kept, torch.inf).amin(dim=-1)
    assert (pre_acts.masked_fill(is_kept, 0.0).amax(dim=-1) < smallest_kept).all()


def test_entries_left_out_have_no_gradient():
    pre_acts = torch.tensor([[3.0, 1.0, 2.0, -1.0]], requires_grad=True)
    (keep_largest(pre_acts, 2) * torch.tensor([5.0, 6.0, 7.0, 8.0])).sum().backward()
    torch.testing.assert_close(pre_acts.grad, torch.tensor([[5.0, 0.0, 7.0, 0.0]]))


def test_sums_of_k_orthonormal_elements_are_reconstructed():
    sae = TopKSAE(d_act=8, n_dict=8, k=3)
    with torch.no_grad():
        sae.decoder.bias.normal_()
    c = keep_largest(torch.rand(50, 8) + 0.1, 3)
    acts = sae(c @ sae.dict_elements + sae.decoder.bias)
    torch.testing.assert_close(acts.c, c, atol=1e-5, rtol=0)
    torch.testing.assert_close(acts.output, acts.input, atol=1e-5, rtol=0)


def test_the_gradients_of_both_codes_add_up_where_one_is_row_sparse(
    monkeypatch: pytest.MonkeyPatch,
):
    x, grads = torch.randn(4, 8), []
    sae = TopKSAE(8, 256, k=2, multi_k=8)
    sae.row_sparse_grads = True
    for min_dense_size in (0, sparse.MIN_DENSE_SIZE):  # active entries alone, all
        monkeypatch.setattr(sparse, "MIN_DENSE_SIZE", min_dense_size)
        acts = sae(x)
        loss = acts.output.square().sum() + sae.other_output(acts, 0).square().sum() / 8
        found = torch.autograd.grad(loss, list(sae.parameters()))
        grads.append(tuple(grad.to_dense() for grad in found))
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (TopKSAEConfig(dict_size_to_input_ratio=2.0, k=9), "k"),
        (TopKSAEConfig(dict_size_to_input_ratio=2.0, k=8, multi_k=9), "multi_k"),
        (BatchTopKSAEConfig(dict_size_to_input_ratio=2.0, k=9), "k"),
        (MatryoshkaSAEConfig(dict_size_to_input_ratio=2.0, k=9), "k"),
        (CodebookSAEConfig(dict_size_to_input_ratio=2.0, k=9), "k"),
        (TranscoderConfig(dict_size_to_input_ratio=2.0, k=9), "k"),
    ],
)
def test_more_active_elements_than_there_are_is_rejected(config: SAEConfig, name: str):
    message = rf"^saes\.{name} \(9\) is above the number of dictionary elements, 8 "
    with pytest.raises(UserError, match=message):
        build_sae(config, d_act=4)


def test_all_elements_may_be_active():
    sae = build_sae(TopKSAEConfig(dict_size_to_input_ratio=2.0, k=8), d_act=4)
    assert sae(torch.randn(3, 4)).c.shape == (3, 8)


def test_a_multi_k_that_is_not_more_is_rejected():
    with pytest.raises(ValueError, match=r"multi_k \(4\) must be above k \(4\)"):
        TopKSAEConfig(dict_size_to_input_ratio=2.0, k=4, multi_k=4)
