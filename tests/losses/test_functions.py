import pytest
import torch

from sparsify.losses.functions import mse, sparsity

EXPONENTS = [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("p_norm", "expected"),
    [
        # The mean norm of (1, 4, 0) and (0, 0, 9), before it is divided by d_act = 2.
        (0.5, 9.0),  # (1 + 2)^2 = 9 and 3^2 = 9: mean 9
        (1.0, 7.0),  # 5 and 9: mean 7
        (2.0, (17**0.5 + 9) / 2),  # sqrt(1 + 16) and 9
    ],
)
def test_sparsity_matches_hand_computation(p_norm: float, expected: float):
    c = torch.tensor([[1.0, 4.0, 0.0], [0.0, 0.0, 9.0]])
    assert sparsity(c, d_act=2, p_norm=p_norm).item() == pytest.approx(expected / 2)


@pytest.mark.parametrize(
    ("p_norm", "expected"),
    [
        # d norm / d c_i = (c_i / norm)^(p - 1), at c = (1, 4, 0); for p != 1 zero where c is zero.
        (0.5, [3.0, 1.5, 0.0]),  # norm 9: (1/9)^(-1/2) = 3, (4/9)^(-1/2) = 3/2
        (1.0, [1.0, 1.0, 1.0]),
        (2.0, [17**-0.5, 4 * 17**-0.5, 0.0]),
    ],
)
def test_sparsity_gradient_matches_hand_computation(p_norm: float, expected: list[float]):
    c = torch.tensor([1.0, 4.0, 0.0], requires_grad=True)
    sparsity(c, d_act=1, p_norm=p_norm).backward()
    torch.testing.assert_close(c.grad, torch.tensor(expected))


@pytest.mark.parametrize("p_norm", [0.5, 1.5, 2.0])
def test_sparsity_gradient_is_finite_and_zero_where_the_code_is_zero(p_norm: float):
    c = torch.tensor([[0.0, 2.0, 1e-30], [0.0, 0.0, 0.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(sparsity(c, d_act=4, p_norm=p_norm), c)
    assert grad.isfinite().all()
    assert not grad[c == 0].any()


@pytest.mark.parametrize("p_norm", EXPONENTS)
def test_sparsity_gradient_through_a_relu_equals_finite_differences(p_norm: float):
    preacts = torch.randn(6, 5, dtype=torch.float64)
    preacts[0] = -preacts[0].abs()  # a sample whose code is all zeros
    preacts = torch.where(preacts.abs() < 0.01, 0.5, preacts).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sparsity(x.relu(), 3, p_norm), preacts)


@pytest.mark.parametrize("p_norm", EXPONENTS)
def test_sparsity_grows_in_proportion_to_the_code(p_norm: float):
    c = torch.rand(2, 3, 7)
    torch.testing.assert_close(sparsity(3 * c, 5, p_norm), 3 * sparsity(c, 5, p_norm))


def test_mse_is_a_mean_over_samples_and_dimensions():
    pred = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert mse(pred, target).item() == pytest.approx((0 + 4 + 9 + 0) / 4)


def test_mse_gives_gradients_to_both_sides():
    pred, target = (torch.randn(3, 2, requires_grad=True) for _ in range(2))
    pred_grad, target_grad = torch.autograd.grad(mse(pred, target), (pred, target))
    torch.testing.assert_close(pred_grad, -target_grad)
    assert pred_grad.any()
