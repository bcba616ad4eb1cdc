import torch

from sparsify.saes.build import build_sae
from sparsify.saes.config import ReLUTiedBiasSAEConfig
from sparsify.saes.relu_tied_bias import ReLUTiedBiasSAE


def tiny_sae() -> ReLUTiedBiasSAE:
    """Three elements on activations of width two, with round numbers."""
    sae = build_sae(ReLUTiedBiasSAEConfig(dict_size_to_input_ratio=1.5), d_act=2)
    assert isinstance(sae, ReLUTiedBiasSAE)
    sae.load_state_dict(
        {
            "encoder.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]),
            "encoder.bias": torch.tensor([0.5, -1.0, 0.0]),
            "decoder.weight": torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.8, 1.0]]),
            "decoder.bias": torch.tensor([1.0, 2.0]),
        }
    )
    return sae


def test_code_and_output_match_hand_computation():
    # Centred input (3, 5) - (1, 2) = (2, 3); c = relu(2 + 0.5, 3 - 1, -2) = (2.5, 2, 0);
    # output = 2.5 (1, 0) + 2 (0.6, 0.8) + (1, 2) = (4.7, 3.6).
    acts = tiny_sae()(torch.tensor([[3.0, 5.0]]))
    torch.testing.assert_close(acts.c, torch.tensor([[2.5, 2.0, 0.0]]))
    torch.testing.assert_close(acts.output, torch.tensor([[4.7, 3.6]]))


def test_gradients_match_hand_computation():
    # dL/doutput = (1, 0), so dL/dc = (1, 0.6) at the active elements 0 and 1. Through the encoder
    # the centred input gets 1 (1, 0) + 0.6 (0, 1), and the bias, added at the end and subtracted at
    # the start, (1, 0) - (1, 0.6). An element gets c_j (1, 0).
    sae = tiny_sae()
    x = torch.tensor([[3.0, 5.0]], requires_grad=True)
    sae(x).output[0, 0].backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 0.6]]))
    torch.testing.assert_close(sae.affine.bias.grad, torch.tensor([1.0, 0.6, 0.0]))
    torch.testing.assert_close(sae.decoder.bias.grad, torch.tensor([0.0, -0.6]))
    expected = torch.tensor([[2.5, 0.0], [2.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(sae.decoder.elements.grad, expected)
