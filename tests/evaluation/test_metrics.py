import math

import pytest
import torch

from sparsify.evaluation.metrics import (
    NO_TARGET,
    cross_entropy,
    explained_variance,
    kl_divergence,
    l2_ratio,
    recovered_fraction,
    squared_distance,
    standard_deviation,
    top1_agreement,
    unexplained_per_token,
)


def log_probs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_l2_ratio_by_hand():
    output = torch.tensor([[0.0, 2.5], [1.0, 0.0]])
    input = torch.tensor([[3.0, 4.0], [0.0, 0.0]])  # norms 5 and 0
    ratios = l2_ratio(output, input)
    assert ratios[0].item() == pytest.approx(0.5)  # 2.5 / 5
    assert ratios[1].isnan()


def test_explained_variance_is_a_ratio_of_sums():
    input = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 6.0]])  # mean (2, 2)
    output = torch.tensor([[0.0, 1.0], [4.0, 0.0], [2.0, 3.0]])  # errors 1, 0, 9: sum 10
    errors = squared_distance(output, input)
    # deviations (-2, -2), (2, -2), (0, 4): 8, 8, 16: sum 32
    deviations = squared_distance(input, input.mean(dim=0))
    # 1 - 10/32
    assert explained_variance(errors.sum().item(), deviations.sum().item()) == pytest.approx(0.6875)
    # mean of 1/8, 0, 9/16 = 0.229167
    assert unexplained_per_token(errors, deviations).mean().item() == pytest.approx(
        0.229167, abs=1e-6
    )


def test_writing_the_mean_explains_nothing():
    input = torch.randn(5, 3, dtype=torch.float64)
    mean = input.mean(dim=0)
    errors = squared_distance(mean.expand_as(input), input).sum().item()
    assert explained_variance(errors, squared_distance(input, mean).sum().item()) == pytest.approx(
        0
    )


def test_explained_variance_is_undefined_without_variance():
    assert math.isnan(explained_variance(0.0, 0.0))


def test_standard_deviation_by_hand():
    # 1, 3, 5: mean 3, squared distances 4, 0, 4, of which two are free: 8 / 2 = 4
    assert standard_deviation(9.0, 35.0, 3) == pytest.approx(2.0)
    assert standard_deviation(3.0, 3.0 - 1e-9, 3) == 0.0  # 1, 1, 1, with a rounding error
    assert math.isnan(standard_deviation(1.0, 1.0, 1))


def test_cross_entropy_by_hand():
    values = cross_entropy(
        log_probs([0.5, 0.5], [0.25, 0.75], [0.5, 0.5]), torch.tensor([0, 0, NO_TARGET])
    )
    assert values.tolist() == pytest.approx([math.log(2), math.log(4), 0.0])


def test_kl_is_from_orig_to_new_by_hand():
    # 1/2 log((1/2) / (1/4)) + 1/2 log((1/2) / (3/4)) = 0.143841
    kl = kl_divergence(log_probs([0.5, 0.5]), log_probs([0.25, 0.75]))
    assert kl.tolist() == pytest.approx([0.143841], abs=1e-6)


def test_top1_agreement_by_hand():
    orig = log_probs([0.6, 0.3, 0.1], [0.6, 0.3, 0.1])
    new = log_probs([0.4, 0.3, 0.3], [0.3, 0.6, 0.1])
    assert top1_agreement(orig, new).tolist() == [True, False]


@pytest.mark.parametrize(
    ("spliced", "recovered"),
    [
        (3.0, 1.0),  # (7 - 3) / (7 - 3)
        (7.0, 0.0),  # (7 - 7) / 4
        (4.0, 0.75),  # (7 - 4) / 4
        (9.0, -0.5),  # (7 - 9) / 4
        (2.0, 1.25),  # (7 - 2) / 4
    ],
)
def test_recovered_fraction_by_hand(spliced: float, recovered: float):
    assert recovered_fraction(3.0, spliced, 7.0) == pytest.approx(recovered)


@pytest.mark.parametrize("ablated", [3.0, 2.5])
def test_nothing_can_be_recovered_where_ablation_loses_nothing(ablated: float):
    assert math.isnan(recovered_fraction(3.0, 3.1, ablated))
