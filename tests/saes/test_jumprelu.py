import pytest
import torch
from torch import Tensor

from sparsify.saes.base import NewElements
from sparsify.saes.build import build_sae
from sparsify.saes.config import JumpReLUSAEConfig
from sparsify.saes.jumprelu import JumpReLU, JumpReLUSAE, Step


def tiny_sae() -> JumpReLUSAE:
    """Three elements on activations of width two, with round numbers."""
    config = JumpReLUSAEConfig(dict_size_to_input_ratio=1.5, bandwidth=0.5, initial_threshold=0.25)
    sae = build_sae(config, d_act=2)
    assert isinstance(sae, JumpReLUSAE)
    sae.load_state_dict(
        {
            "encoder.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
            "encoder.bias": torch.tensor([0.0, 0.0, -4.0]),
            "decoder.weight": torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.8, 1.0]]),
            "decoder.bias": torch.tensor([1.0, 2.0]),
            "log_threshold": torch.tensor([1.9, 5.5, 2.0]).log(),
        }
    )
    return sae


def test_code_and_output_match_hand_computation():
    # Centred input (3, 7) - (1, 2) = (2, 5); pre-activations (2, 5, 2 + 5 - 4); thresholds
    # (1.9, 5.5, 2), so c = (2, 0, 3); output = 2 (1, 0) + 3 (0, 1) + (1, 2) = (3, 5).
    sae = tiny_sae()
    acts = sae(torch.tensor([[3.0, 7.0]]))
    torch.testing.assert_close(acts.c, torch.tensor([[2.0, 0.0, 3.0]]))
    torch.testing.assert_close(acts.output, torch.tensor([[3.0, 5.0]]))
    torch.testing.assert_close(sae.active(acts), torch.tensor([[1.0, 0.0, 1.0]]))


def test_thresholds_start_where_the_config_says():
    config = JumpReLUSAEConfig(dict_size_to_input_ratio=1.5, bandwidth=0.5, initial_threshold=0.25)
    sae = build_sae(config, d_act=2)
    assert isinstance(sae, JumpReLUSAE)
    torch.testing.assert_close(sae.threshold, torch.full((3,), 0.25))
    assert sae.bandwidth == 0.5


# Two tokens, two elements. With a bandwidth of 0.4, a window reaches 0.2 to each side of a
# threshold: in that of element 0 are both tokens, active or not, in that of element 1 the first.
Z = [[0.4, 2.1], [0.6, 2.3]]
THRESHOLD = [0.5, 2.0]
GRAD = [[2.0, 3.0], [5.0, 7.0]]


def gradients(function: type[JumpReLU | Step]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The value, and the gradients of z and of the thresholds."""
    z = torch.tensor(Z, requires_grad=True)
    threshold = torch.tensor(THRESHOLD, requires_grad=True)
    value = function.apply(z, threshold, 0.4)
    assert isinstance(value, Tensor)
    value.backward(torch.tensor(GRAD))
    return value, z.grad, threshold.grad


def test_gradients_of_the_code_match_hand_computation():
    # -theta / eps, times the gradients in the window: -0.5 / 0.4 (2 + 5) and -2 / 0.4 * 3.
    c, by_z, by_threshold = gradients(JumpReLU)
    torch.testing.assert_close(c, torch.tensor([[0.0, 2.1], [0.6, 2.3]]))
    torch.testing.assert_close(by_z, torch.tensor([[0.0, 3.0], [5.0, 7.0]]))
    torch.testing.assert_close(by_threshold, torch.tensor([-8.75, -15.0]))


def test_gradients_of_the_number_of_active_entries_match_hand_computation():
    # -1 / eps, times the gradients in the window: -1 / 0.4 (2 + 5) and -1 / 0.4 * 3; none for z.
    active, by_z, by_threshold = gradients(Step)
    torch.testing.assert_close(active, torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    assert by_z is None
    torch.testing.assert_close(by_threshold, torch.tensor([-17.5, -7.5]))


@pytest.mark.parametrize(("function", "expected"), [(JumpReLU, -0.35), (Step, -0.5)])
def test_over_many_tokens_it_is_the_derivative_of_the_mean(
    function: type[JumpReLU | Step], expected: float
):
    # z even in (0, 2), so of density 1/2: the mean of c is (4 - theta^2) / 4, with the derivative
    # -theta / 2, and that of the number of active entries (2 - theta) / 2, with -1/2.
    z = (torch.arange(20_000)[:, None] + 0.5) / 10_000
    threshold = torch.tensor([0.7], requires_grad=True)
    value = function.apply(z, threshold, 0.3)
    assert isinstance(value, Tensor)
    value.mean().backward()
    assert threshold.grad is not None
    assert threshold.grad.item() == pytest.approx(expected, rel=1e-3)


def test_the_gradient_of_a_threshold_goes_to_its_logarithm():
    # Of the pre-activations (2, 5, 3) the first alone is within 0.25 of its threshold, 1.9. Its
    # number gives the threshold -1 / 0.5 = -2, the logarithm 1.9 times that.
    sae = tiny_sae()
    sae.active(sae(torch.tensor([[3.0, 7.0]]))).sum().backward()
    torch.testing.assert_close(sae.log_threshold.grad, torch.tensor([-3.8, 0.0, 0.0]))
    assert [name for name, p in sae.named_parameters() if p.grad is not None] == ["log_threshold"]


def test_the_output_trains_all_parameters_as_worked_out_by_hand():
    # The sum of the output has the gradient 1 (1, 1), so c has (1, 1.4, 1). The threshold 1.9 gets
    # -1.9 / 0.5 * 1, its logarithm 1.9 times that. The encoder gets c's where it is active.
    sae = tiny_sae()
    sae(torch.tensor([[3.0, 7.0]])).output.sum().backward()
    torch.testing.assert_close(sae.log_threshold.grad, torch.tensor([-7.22, 0.0, 0.0]))
    torch.testing.assert_close(sae.affine.bias.grad, torch.tensor([1.0, 0.0, 1.0]))
    expected = torch.tensor([[2.0, 2.0], [0.0, 0.0], [3.0, 3.0]])
    torch.testing.assert_close(sae.decoder.elements.grad, expected)


def test_reset_elements_have_the_threshold_that_all_started_with():
    sae = tiny_sae()
    sae.reset_elements(
        NewElements(torch.tensor([1]), torch.randn(1, 2), torch.randn(1, 2), torch.zeros(2))
    )
    torch.testing.assert_close(sae.threshold, torch.tensor([1.9, 0.25, 2.0]))
