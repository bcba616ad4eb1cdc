import pytest
import torch

from sparsify.saes.build import build_sae
from sparsify.saes.config import TranscoderConfig
from sparsify.saes.transcoder import Transcoder


def tiny_transcoder(k: int | None = None, *, skip: bool = False) -> Transcoder:
    """Two elements that read a width of four and write one of two, with round numbers."""
    config = TranscoderConfig(dict_size_to_input_ratio=0.5, k=k, skip=skip)
    sae = build_sae(config, d_act=4, d_out=2)
    assert isinstance(sae, Transcoder)
    state = {
        "encoder.weight": torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 1.0]]),
        "encoder.bias": torch.tensor([-1.0, 1.0]),
        "decoder.weight": torch.tensor([[0.6, 0.0], [0.8, 1.0]]),
        "decoder.bias": torch.tensor([10.0, 20.0]),
    }
    if skip:
        state["skip.weight"] = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    sae.load_state_dict(state)
    return sae


X = torch.tensor([[1.0, 1.0, 2.0, 0.0]])


# The input is not centred: pre-activations are (1 + 2 - 1, 2 + 1) = (2, 3). Both elements write
# 2 (0.6, 0.8) + 3 (0, 1) + (10, 20), the larger alone (0, 3) + (10, 20); the skip adds (1, 2 * 2).
@pytest.mark.parametrize(
    ("k", "skip", "c", "output"),
    [
        (None, False, [2.0, 3.0], [11.2, 24.6]),
        (1, False, [0.0, 3.0], [10.0, 23.0]),
        (None, True, [2.0, 3.0], [12.2, 28.6]),
        (1, True, [0.0, 3.0], [11.0, 27.0]),
    ],
)
def test_code_and_output_match_hand_computation(
    k: int | None, skip: bool, c: list[float], output: list[float]
):
    acts = tiny_transcoder(k, skip=skip)(X)
    torch.testing.assert_close(acts.input, X)
    torch.testing.assert_close(acts.c, torch.tensor([c]))
    torch.testing.assert_close(acts.output, torch.tensor([output]))


def test_negative_pre_activations_are_zero_in_the_code():
    for k in (None, 2):
        assert tiny_transcoder(k).encode(-X).tolist() == [[0.0, 0.0]]


def test_gradients_match_hand_computation():
    # The first output has the gradients (0.6, 0) by the code, 0.6 (1, 0, 1, 0) by the input through
    # the encoder and (1, 0, 0, 0) through the skip. The decoder's bias is not subtracted first.
    sae = tiny_transcoder(skip=True)
    x = X.clone().requires_grad_()
    sae(x).output[0, 0].backward()
    assert sae.skip is not None
    torch.testing.assert_close(x.grad, torch.tensor([[1.6, 0.0, 0.6, 0.0]]))
    torch.testing.assert_close(sae.decoder.bias.grad, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(sae.skip.weight.grad, torch.cat([X, torch.zeros(1, 4)]))
    expected = torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    torch.testing.assert_close(sae.decoder.elements.grad, expected)


@pytest.mark.parametrize("d_out", [2, 4, 7])
def test_the_skip_starts_at_zero_and_what_is_written_has_its_own_width(d_out: int):
    torch.manual_seed(3)
    with_skip = Transcoder(4, 9, d_out)
    with_skip.add_skip()
    torch.manual_seed(3)
    without = Transcoder(4, 9, d_out)
    x = torch.randn(2, 5, 4)
    assert with_skip(x).output.shape == (2, 5, d_out)
    torch.testing.assert_close(with_skip(x).output, without(x).output, rtol=0, atol=0)


def test_elements_have_unit_norm_and_biases_are_zero_at_the_start():
    for d_out in (2, 12):
        sae = Transcoder(4, 9, d_out)
        torch.testing.assert_close(sae.dict_elements.norm(dim=1), torch.ones(9))
        assert not sae.affine.bias.any()
        assert not sae.decoder.bias.any()


def test_without_a_width_to_write_it_writes_what_it_reads():
    sae = build_sae(TranscoderConfig(dict_size_to_input_ratio=2.0), d_act=4)
    assert (sae.d_act, sae.n_dict, sae.d_out) == (4, 8, 4)
