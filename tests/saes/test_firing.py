import math

import pytest
import torch

from sparsify.saes.firing import FiringCounter

C = torch.tensor([[[0.5, 0.0, 0.0], [0.1, 0.0, -2.0]]])


def test_firings_by_hand():
    counter = FiringCounter(3)
    counter.update(C)
    counter.update(torch.tensor([[0.0, 0.0, 1.0]]))
    assert counter.counts.tolist() == [2, 0, 2]
    assert counter.n_tokens == 3
    assert counter.n_alive == 2
    assert counter.l0 == pytest.approx(4 / 3)  # 1 + 2 + 1 firings on 3 tokens


def test_reset_forgets():
    counter = FiringCounter(3)
    counter.update(C)
    counter.reset()
    assert (counter.n_alive, counter.n_tokens) == (0, 0)
    assert math.isnan(counter.l0)


def test_counting_goes_on_after_inference_mode():
    counter = FiringCounter(3)
    with torch.inference_mode():
        counter.update(C)
    counter.update(C.clone().requires_grad_())
    assert counter.counts.tolist() == [4, 0, 2]
    assert not counter.counts.requires_grad


def test_codes_of_another_width_are_rejected():
    with pytest.raises(ValueError, match="c has 3 entries per token, expected 2"):
        FiringCounter(2).update(C)
