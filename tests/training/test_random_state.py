import random
from pathlib import Path

import numpy as np
import torch

from sparsify.runs.weight_files import load_state, save_state, state_path
from sparsify.training.random_state import get_random_state, set_random_state, set_seed


def _draw() -> list[float]:
    return [
        random.random(),
        random.gauss(),
        np.random.rand(),  # noqa: NPY002
        np.random.randn(),  # noqa: NPY002
        torch.rand(()).item(),
    ]


def test_one_seed_gives_one_sequence():
    set_seed(3)
    first = _draw()
    set_seed(3)
    assert _draw() == first
    set_seed(4)
    assert _draw() != first


def test_generators_go_on_from_a_saved_state(tmp_path: Path):
    set_seed(3)
    _draw()
    save_state(tmp_path, 1, {"random": get_random_state()})
    expected = _draw()
    set_seed(5)
    set_random_state(load_state(state_path(tmp_path, 1))["random"])
    assert _draw() == expected
