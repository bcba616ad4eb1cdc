import torch

from sparsify.saes.base import NewElements
from sparsify.saes.build import build_sae
from sparsify.saes.config import GatedSAEConfig
from sparsify.saes.gated import GatedSAE


def tiny_sae() -> GatedSAE:
    """Four elements on activations of width two, with round numbers."""
    sae = build_sae(GatedSAEConfig(dict_size_to_input_ratio=2.0), d_act=2)
    assert isinstance(sae, GatedSAE)
    sae.load_state_dict(
        {
            "encoder.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]]),
            "encoder.bias": torch.tensor([-1.0, 2.0, -3.0, 5.0]),
            "decoder.weight": torch.tensor([[1.0, 0.6, 0.0, 0.0], [0.0, 0.8, 1.0, -1.0]]),
            "decoder.bias": torch.tensor([10.0, 20.0]),
            "log_scale": torch.tensor([2.0, 1.0, 1.0, 1.0]).log(),
            "magnitude_bias": torch.tensor([1.0, 3.0, 0.0, 0.0]),
        }
    )
    return sae


# Centred, it is (2, -1), and W_enc times that (2, -1, 1, -2).
X = torch.tensor([[12.0, 19.0]])


def test_code_and_output_match_hand_computation():
    # Gates (2 - 1, -1 + 2, 1 - 3, -2 + 5) = (1, 1, -2, 3): all open but the third.
    # Magnitudes (2 * 2 + 1, -1 + 3, 1, -2) = (5, 2, 1, -2), so c = (5, 2, 0, 0)
    # and output = 5 (1, 0) + 2 (0.6, 0.8) + (10, 20) = (16.2, 21.6).
    acts = tiny_sae()(X)
    torch.testing.assert_close(acts.c, torch.tensor([[5.0, 2.0, 0.0, 0.0]]))
    torch.testing.assert_close(acts.output, torch.tensor([[16.2, 21.6]]))


def test_the_penalty_and_the_other_output_read_the_gates():
    # relu(gates) = (1, 1, 0, 3), and the other output is
    # (1, 0) + (0.6, 0.8) + 3 (0, -1) + (10, 20) = (11.6, 17.8).
    sae = tiny_sae()
    acts = sae(X)
    assert sae.other_weights == (1.0,)
    torch.testing.assert_close(acts.penalised, torch.tensor([[1.0, 1.0, 0.0, 3.0]]))
    torch.testing.assert_close(sae.other_output(acts, 0), torch.tensor([[11.6, 17.8]]))


def test_the_output_trains_magnitudes_and_not_gates():
    # The first output has the gradients (1, 0.6) by the active entries, whose scales so get
    # 1 * 2 * 2 and 0.6 * 1 * -1, and rows of W_enc 1 * 2 (2, -1) and 0.6 * 1 (2, -1).
    sae = tiny_sae()
    sae(X).output[0, 0].backward()
    torch.testing.assert_close(sae.affine.bias.grad, torch.zeros(4))
    torch.testing.assert_close(sae.magnitude_bias.grad, torch.tensor([1.0, 0.6, 0.0, 0.0]))
    torch.testing.assert_close(sae.log_scale.grad, torch.tensor([4.0, -0.6, 0.0, 0.0]))
    rows = torch.tensor([[4.0, -2.0], [1.2, -0.6], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(sae.affine.weight.grad, rows)


def test_the_other_output_trains_gates_and_neither_magnitudes_nor_decoder():
    # It has the gradients (0, 0.8, 0, -1) by the open gates. The decoder's bias gets only what
    # comes through the encoder, -(0.8 (0, 1) - 1 (-1, 0)).
    sae = tiny_sae()
    sae.other_output(sae(X), 0)[0, 1].backward()
    torch.testing.assert_close(sae.affine.bias.grad, torch.tensor([0.0, 0.8, 0.0, -1.0]))
    rows = torch.tensor([[0.0, 0.0], [1.6, -0.8], [0.0, 0.0], [-2.0, 1.0]])
    torch.testing.assert_close(sae.affine.weight.grad, rows)
    torch.testing.assert_close(sae.decoder.bias.grad, torch.tensor([-1.0, -0.8]))
    untrained = (sae.decoder.elements, sae.log_scale, sae.magnitude_bias)
    assert all(parameter.grad is None for parameter in untrained)


def test_the_penalty_trains_gates_alone():
    sae = tiny_sae()
    sae(X).penalised.sum().backward()
    torch.testing.assert_close(sae.affine.bias.grad, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    untrained = (sae.decoder.elements, sae.log_scale, sae.magnitude_bias)
    assert all(parameter.grad is None for parameter in untrained)


def test_at_the_start_magnitudes_are_the_gates():
    sae = GatedSAE(d_act=4, n_dict=9)
    acts = sae(torch.randn(5, 4))
    torch.testing.assert_close(acts.c, acts.penalised)
    torch.testing.assert_close(acts.output, sae.other_output(acts, 0))


def test_reset_elements_have_magnitudes_like_their_gates():
    sae = tiny_sae()
    sae.reset_elements(
        NewElements(torch.tensor([0]), torch.randn(1, 2), torch.randn(1, 2), torch.zeros(2))
    )
    torch.testing.assert_close(sae.log_scale, torch.zeros(4))
    torch.testing.assert_close(sae.magnitude_bias, torch.tensor([0.0, 3.0, 0.0, 0.0]))
