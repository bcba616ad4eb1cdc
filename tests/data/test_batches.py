from itertools import islice

import pytest
import torch

from sparsify.data.batches import TensorBatches
from sparsify.settings.base_config import UserError

ROWS = torch.arange(10)


def batches(n_epochs: int | None = 2) -> TensorBatches:
    return TensorBatches(ROWS, 2 * ROWS, batch_size=4, seed=0, n_epochs=n_epochs)


def as_lists(loader: TensorBatches) -> list[list[int]]:
    return [first.tolist() for first, _ in loader]


def test_each_pass_has_another_order_and_rows_stay_together():
    found = list(batches())
    assert len(found) == 4
    assert all(torch.equal(second, 2 * first) for first, second in found)
    passes = [torch.cat([first for first, _ in part]) for part in (found[:2], found[2:])]
    assert all(len(rows.unique()) == 8 for rows in passes)
    assert not torch.equal(*passes)
    assert as_lists(batches()) == as_lists(batches())


def test_without_a_number_of_passes_there_is_no_end():
    assert len(list(islice(batches(None), 50))) == 50


@pytest.mark.parametrize("n_before", range(5))
def test_an_iteration_is_resumed_exactly_and_once(n_before: int):
    expected = as_lists(batches())
    loader = batches()
    list(islice(loader, n_before))
    resumed = batches()
    resumed.load_state_dict(loader.state_dict())
    assert as_lists(resumed) == expected[n_before:]
    assert as_lists(resumed) == expected


def test_data_that_make_no_batch_are_refused():
    with pytest.raises(UserError, match=r"tensors of \[3, 10\] rows"):
        TensorBatches(ROWS, ROWS[:3], batch_size=2, seed=0)
    with pytest.raises(UserError, match="10 samples are less than one batch of 11"):
        TensorBatches(ROWS, batch_size=11, seed=0)
