from typing import Any

import pytest
import torch
from torch.optim import Adam

from sparsify.training.config import TrainingConfig
from sparsify.training.schedules import build_lr_schedulers, calc_lr_factor

# Ten optimizer steps of four samples.
FIELDS: dict[str, Any] = {"n_samples": 40, "batch_size": 2, "effective_batch_size": 4, "lr": 0.5}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # Two steps of warmup: 0/2, 1/2.
        ({"lr_schedule": "constant", "warmup_samples": 8}, [0.0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        # The last four steps: 4/4, 3/4, 2/4, 1/4; no lower than 0.4.
        (
            {"lr_schedule": "linear", "cooldown_samples": 16, "min_lr_factor": 0.4},
            [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.4],
        ),
        # From the end of the warmup, 8/8 ... 1/8.
        (
            {
                "lr_schedule": "linear",
                "warmup_samples": 8,
                "cooldown_samples": None,
                "min_lr_factor": 0.0,
            },
            [0.0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
        ),
        # 0.2 + 0.8 * (1 + cos(pi * step / 6)) / 2 over the six steps after the warmup.
        (
            {"lr_schedule": "cosine", "warmup_samples": 16, "min_lr_factor": 0.2},
            [0.0, 0.25, 0.5, 0.75, 1, 0.9464102, 0.8, 0.6, 0.4, 0.2535898],
        ),
    ],
)
def test_factors_match_hand_computation(fields: dict[str, Any], expected: list[float]):
    config = TrainingConfig.model_validate(FIELDS | fields)
    factors = [calc_lr_factor(step, config) for step in range(10)]
    assert factors == pytest.approx(expected)


def test_cosine_stays_at_its_minimum_after_the_last_step():
    config = TrainingConfig.model_validate(FIELDS)
    assert [calc_lr_factor(step, config) for step in (10, 11, 20)] == pytest.approx([0.1] * 3)


def test_warmup_shorter_than_a_step_is_no_warmup():
    config = TrainingConfig.model_validate(
        FIELDS | {"lr_schedule": "constant", "warmup_samples": 3}
    )
    assert calc_lr_factor(0, config) == 1.0


def test_every_optimizer_keeps_its_own_learning_rate():
    config = TrainingConfig.model_validate(
        FIELDS | {"lr_schedule": "constant", "warmup_samples": 8}
    )
    optimizers = [Adam([torch.nn.Parameter(torch.zeros(1))], lr=lr) for lr in (0.5, 0.1)]
    schedulers = build_lr_schedulers(optimizers, config)
    seen = []
    for _ in range(3):
        seen.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        for stepped in (*optimizers, *schedulers):
            stepped.step()
    torch.testing.assert_close(seen, [[0.0, 0.0], [0.25, 0.05], [0.5, 0.1]])
