import math
from pathlib import Path

import pytest
import torch

from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.losses.total import total_loss
from sparsify.runs.weight_files import load_state, save_state
from sparsify.saes.acts import SAEActs
from sparsify.training.coefficients import Coefficients, L0Controller

FIRST, SECOND = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"
CPU = torch.device("cpu")


def factor_after(*l0: float) -> float:
    """That of a controller whose target is 10."""
    controller = L0Controller(10.0, CPU)
    for each in l0:
        controller.update(torch.tensor(each))
    return controller.factor.item()


def runs_with_l0(*l0: int) -> Passes:
    """Two tokens, the first of twice the mean, so that their mean is what is asked for."""
    acts = {}
    for position, n_active in zip((FIRST, SECOND), l0, strict=False):
        c = torch.zeros(1, 2, 100)
        c[0, 0, : 2 * n_active] = 0.5
        acts[position] = SAEActs(torch.zeros(1, 2, 50), c, torch.ones(1, 2, 50))
    return Passes({}, acts)


def coefficients(fields: dict[str, object]) -> Coefficients:
    losses = LossConfig.model_validate(fields)
    return Coefficients(losses, [FIRST, SECOND], n_samples=110, device=CPU)


def test_factors_follow_the_schedule_of_their_term():
    schedule = {"warmup_samples": 10, "end_factor": 0.2}
    now = coefficients({"out_to_in": {"coeff": 3, "schedule": schedule}, "logits_kl": {"coeff": 2}})
    assert now.factor("out_to_in", FIRST) == 0
    for n_samples, expected in [(5, 0.5), (10, 1.0), (60, 0.6), (110, 0.2)]:
        now.update(runs_with_l0(1, 1), n_samples)
        assert now.factor("out_to_in", FIRST) == pytest.approx(expected)
        assert now.factor("logits_kl", "") == 1


def test_the_loss_is_multiplied_by_the_factors():
    fields = {
        "sparsity": {"coeff": 3, "target_l0": 10},
        "out_to_in": {"coeff": 2, "schedule": {"warmup_samples": 10}},
    }
    now, passes = coefficients(fields), runs_with_l0(20, 10)
    now.update(passes, 5)
    total, values = total_loss(LossConfig.model_validate(fields), passes, now.factor)
    # Sparsity is 0.5 * L0 / d_act = 0.2 and 0.1, the errors are 1 each. The first L0 is twice its
    # target, the second has it.
    assert values[f"sparsity/{FIRST}"].item() == pytest.approx(0.2)
    assert total.item() == pytest.approx(3 * (0.2 * factor_after(20.0) + 0.1) + 2 * 0.5 * (1 + 1))


def test_a_controller_pushes_against_the_error():
    assert factor_after() == 1
    assert factor_after(10.0) == 1
    assert factor_after(11.0) > 1.1
    assert factor_after(*[12.0] * 50) > factor_after(12.0)  # it is summed up
    # As much in one direction as in the other.
    assert factor_after(11.0, 13.0) * factor_after(100 / 11, 100 / 13) == pytest.approx(1)


def test_the_first_steps_do_not_multiply_the_coefficient_by_much():
    assert factor_after(1e4) < 10
    assert factor_after(0.0) > 0.1


def sum_after(*l0: float) -> float:
    controller = L0Controller(10.0, CPU)
    for each in l0:
        controller.update(torch.tensor(each))
    return controller.sum.item()


def test_nothing_is_summed_up_while_l0_comes_near_its_target_fast():
    start = sum_after(40.0)
    assert sum_after(40.0, 11.0) == start > 0
    assert sum_after(40.0, 39.9) > start
    assert sum_after(40.0, 60.0) > start
    assert sum_after(2.5, 9.0) == -start


def test_a_controller_of_another_term_is_not_asked():
    now = coefficients({"sparsity": {"coeff": 3, "target_l0": 10}, "out_to_in": {"coeff": 1}})
    now.update(runs_with_l0(40, 40), 5)
    assert now.factor("out_to_in", FIRST) == 1
    assert float(now.factor("sparsity", FIRST)) > 2


@pytest.mark.parametrize("target", [20.0, 100.0, 600.0])
def test_a_controller_reaches_its_l0_and_stays(target: float):
    controller = L0Controller(target, CPU)
    # L0 goes towards 200 * coeff^-0.8 over 50 steps, from where an SAE starts; a batch is noisy.
    l0, seen = 400.0, []
    for noise in torch.randn(2500):
        controller.update(torch.tensor(l0) * (1 + 0.05 * noise))
        steady = 200 * controller.factor.item() ** -0.8
        l0 += (steady - l0) / 50
        seen.append(l0)
    assert max(abs(l0 / target - 1) for l0 in seen[1750:]) < 0.1


@pytest.mark.parametrize(("l0", "opposite"), [(1e4, 5.0), (0.0, 20.0)])
def test_the_factor_of_a_target_out_of_reach_is_bounded_and_comes_back(l0: float, opposite: float):
    controller, logs = L0Controller(10.0, CPU), []
    for each in [*[l0] * 700, *[opposite] * 200]:
        controller.update(torch.tensor(each))
        logs.append(abs(controller.factor.log().item()))
    assert logs[599] == logs[699] == max(logs)
    assert math.log(1e6) < max(logs) < math.log(1e8)
    assert logs[899] < math.log(1e6) - 2  # on the other side it goes back at once


@pytest.mark.parametrize(
    ("l0", "n_samples", "direction"),
    [(40, 0, 0), (20, 20, 0), (21, 20, 1), (19, 20, -1), (10, 40, 0), (11, 110, 1)],
)
def test_the_target_moves_from_the_first_l0_by_equal_factors(
    l0: int, n_samples: int, direction: int
):
    # From 40 to 10 in 40 samples, so half way it is 20.
    sparsity = {"coeff": 1, "target_l0": 10, "target_warmup_samples": 40}
    now = coefficients({"sparsity": sparsity})
    now.update(runs_with_l0(40, 10), 0)
    now.update(runs_with_l0(l0, 10), n_samples)
    assert math.log(now.factor("sparsity", FIRST)) * direction >= 0
    assert (now.factor("sparsity", FIRST) == pytest.approx(1, abs=1e-5)) == (direction == 0)


def test_a_batch_without_tokens_is_forgotten():
    assert 1 < factor_after(20.0, math.nan, 20.0) < 10


BOTH: dict[str, object] = {
    "sparsity": {"coeff": 3, "target_l0": 10},
    "out_to_in": {"coeff": 2, "schedule": {"end_factor": 0.5}},
}


def factors(now: Coefficients) -> list[float]:
    pairs = [("sparsity", FIRST), ("sparsity", SECOND), ("out_to_in", FIRST)]
    return [float(now.factor(*pair)) for pair in pairs]


def test_a_resumed_run_goes_on_with_the_same_factors(tmp_path: Path):
    steps = [runs_with_l0(*l0) for l0 in torch.randint(5, 40, (20, 2)).tolist()]
    whole, first, second = (coefficients(BOTH) for _ in range(3))
    expected = []
    for index, passes in enumerate(steps):
        whole.update(passes, 5 * index)
        expected.append(factors(whole))
    for index, passes in enumerate(steps[:8]):
        first.update(passes, 5 * index)
    second.load_state_dict(load_state(save_state(tmp_path, 40, first.state_dict())))
    actual = [factors(second)]
    for index, passes in enumerate(steps[8:], start=8):
        second.update(passes, 5 * index)
        actual.append(factors(second))
    assert actual == expected[7:]


def test_metrics_are_the_coefficients_of_the_moment():
    now = coefficients(BOTH)
    now.update(runs_with_l0(20, 10), 20)
    metrics = now.metrics()
    assert metrics["coeff/train/out_to_in"] == pytest.approx(2 * (1 - 0.5 * 20 / 110))
    assert metrics[f"coeff/train/sparsity/{FIRST}"] == pytest.approx(3 * factor_after(20.0))
    assert metrics[f"coeff/train/sparsity/{SECOND}"] == pytest.approx(3)


def test_a_controlled_coefficient_is_a_metric_of_each_position():
    now = coefficients({"sparsity": {"coeff": 3, "target_l0": 10}, "out_to_in": {"coeff": 1}})
    assert now.metrics() == {f"coeff/train/sparsity/{name}": 3.0 for name in (FIRST, SECOND)}


def test_coefficients_that_stay_are_no_metrics():
    assert coefficients({"sparsity": {"coeff": 3}, "out_to_in": {"coeff": 1}}).metrics() == {}
