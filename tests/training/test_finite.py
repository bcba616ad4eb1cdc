import math

import pytest
import torch

from sparsify.settings.base_config import UserError
from sparsify.training.finite import check_gradient, check_weights

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_and_weights_that_are_not_finite_are_refused(value: float):
    with pytest.raises(UserError, match=r"^grad_norm is (nan|inf) after 40 samples, before the"):
        check_gradient(torch.tensor(value), 40)
    with pytest.raises(
        UserError, match=r"^weights or gradients are no longer finite after 40 samples and are"
    ):
        check_weights([torch.ones(2), torch.tensor([1.0, value])], 40)


def test_gradients_of_half_a_step_are_looked_at():
    gradient = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.tensor([[math.inf]]), (3, 1), check_invariants=True
    )
    with pytest.raises(UserError, match=r"^weights or gradients are no longer finite after 8 samp"):
        check_weights([torch.ones(2), gradient], 8)


def test_finite_numbers_pass():
    check_gradient(torch.tensor(1.0), 40)
    check_weights([torch.tensor(1.0), torch.arange(3.0)], 40)
