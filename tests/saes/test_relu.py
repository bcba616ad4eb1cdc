import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify.kernels.sparse import find_active
from sparsify.saes.relu import ReLUSAE


@pytest.fixture
def sae() -> ReLUSAE:
    """An SAE of two elements on activations of width two, with round numbers."""
    sae = ReLUSAE(d_act=2, n_dict=2)
    sae.load_state_dict(
        {
            "encoder.0.weight": torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
            "encoder.0.bias": torch.tensor([1.0, -4.0]),
            "decoder.weight": torch.tensor([[3.0, 0.0], [4.0, 2.0]]),
            "decoder.bias": torch.tensor([10.0, 20.0]),
        }
    )
    return sae


def test_output_matches_hand_computation(sae: ReLUSAE):
    # c = relu(1 + 1, 1 + 2 - 4) = (2, 0); decoder columns (3, 4) and (0, 2) have norms 5 and 2,
    # so the output is 2 * (3/5, 4/5) + (10, 20) = (11.2, 21.6).
    acts = sae(torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(acts.input, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(acts.c, torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(acts.output, torch.tensor([[11.2, 21.6]]))


def test_dict_elements_are_the_normalised_columns(sae: ReLUSAE):
    torch.testing.assert_close(sae.dict_elements, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_state_dict_has_the_keys_and_shapes_of_the_original():
    shapes = {name: tuple(value.shape) for name, value in ReLUSAE(3, 7).state_dict().items()}
    assert shapes == {
        "encoder.0.weight": (7, 3),
        "encoder.0.bias": (7,),
        "decoder.weight": (3, 7),
        "decoder.bias": (3,),
    }


@pytest.mark.parametrize(("d_act", "n_dict"), [(6, 24), (6, 6), (6, 3)])
def test_decoder_starts_orthonormal(d_act: int, n_dict: int):
    weight = ReLUSAE(d_act, n_dict).decoder.weight
    gram = weight @ weight.T if n_dict >= d_act else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(min(d_act, n_dict)), atol=1e-5, rtol=0)


def test_the_scale_of_the_decoder_does_not_matter():
    sae = ReLUSAE(4, 9)
    x = torch.randn(2, 5, 4)
    before = sae(x).output
    with torch.no_grad():
        sae.decoder.weight.mul_(torch.rand(9) + 0.5)
    torch.testing.assert_close(sae(x).output, before)


def test_output_and_gradients_equal_the_formula():
    sae = ReLUSAE(4, 9).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    enc_w, enc_b, elements, dec_b = sae.parameters()
    c = torch.clamp(x @ enc_w.T + enc_b, min=0)
    expected = c @ F.normalize(elements, dim=1, eps=1e-12) + dec_b
    acts = sae(x)
    torch.testing.assert_close((acts.c, acts.output), (c, expected))
    wanted = [x, *sae.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(acts.output.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
    )


def test_elements_have_unit_norm_whatever_the_weight():
    sae = ReLUSAE(4, 9)
    with torch.no_grad():
        sae.decoder.weight.normal_(std=3.0)
    torch.testing.assert_close(sae.dict_elements.norm(dim=-1), torch.ones(9))


def large_sparse_sae() -> tuple[ReLUSAE, torch.Tensor]:
    """An SAE whose code is so sparse that active entries are worked with alone, and its input."""
    sae = ReLUSAE(64, 1024)
    with torch.no_grad():
        sae.get_parameter("encoder.0.bias").sub_(1.3)
    x = torch.randn(8, 64, 64)
    assert find_active(sae.encode(x), d_act=64) is not None
    return sae, x


@pytest.mark.parametrize("row_sparse_grads", [False, True])
def test_a_sparse_code_gives_what_encoding_and_decoding_give(row_sparse_grads: bool):
    sae, x = large_sparse_sae()
    sae.row_sparse_grads = row_sparse_grads
    acts, c = sae(x), sae.encode(x)
    output = sae.decode(c)
    torch.testing.assert_close((acts.c, acts.output), (c, output))
    grads, expected = (
        torch.autograd.grad(code.mean() + out.square().mean(), list(sae.parameters()))
        for code, out in ((acts.c, acts.output), (c, output))
    )
    torch.testing.assert_close(tuple(grad.to_dense() for grad in grads), expected)


def test_a_sparse_code_needs_no_graph():
    sae, x = large_sparse_sae()
    expected = sae(x).output
    with torch.no_grad():
        torch.testing.assert_close(sae(x).output, expected, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(sae(x).output, expected, rtol=0, atol=0)


def test_weights_that_are_not_finite_show_in_the_output():
    sae, x = large_sparse_sae()
    with torch.no_grad():
        sae.get_parameter("encoder.0.bias")[7] = float("nan")
    assert sae(x).output.isnan().all()


def test_the_decoder_loads_and_saves_as_a_linear_layer():
    linear = nn.Linear(7, 3)
    sae = ReLUSAE(3, 7)
    sae.decoder.load_state_dict(linear.state_dict())
    c = torch.rand(2, 7)
    torch.testing.assert_close(
        sae.decode(c), F.linear(c, F.normalize(linear.weight, dim=0), linear.bias)
    )
    saved = sae.decoder.state_dict()
    assert list(saved) == list(linear.state_dict())
    assert all(tensor.is_contiguous() for tensor in saved.values())
    torch.testing.assert_close(saved, linear.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
def test_copies_and_casts_keep_elements_in_one_piece(assign: bool):
    sae = copy.deepcopy(ReLUSAE(3, 7)).double()
    other = ReLUSAE(3, 7)
    sae.load_state_dict(other.state_dict(), assign=assign)
    assert sae.decoder.elements.is_contiguous()
    torch.testing.assert_close(sae.decoder.weight.float(), other.decoder.weight, rtol=0, atol=0)
    assert [name for name, _ in sae.named_parameters()][2:] == ["decoder.elements", "decoder.bias"]
