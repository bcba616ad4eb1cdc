import pytest
import torch
from torch.nn import functional as F

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
        sae.decoder.weight *= torch.rand(9) + 0.5
    torch.testing.assert_close(sae(x).output, before)


def test_output_and_gradients_equal_the_formula():
    sae = ReLUSAE(4, 9).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    enc_w, enc_b, dec_w, dec_b = sae.parameters()
    c = torch.clamp(x @ enc_w.T + enc_b, min=0)
    expected = c @ F.normalize(dec_w, dim=0, eps=1e-12).T + dec_b
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
