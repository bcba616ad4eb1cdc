import torch

from sparsify.evaluation.histogram import cosine_histogram, histogram


def test_a_bin_holds_its_lower_bound_and_the_outermost_what_lies_beyond():
    values = torch.tensor([-3.0, 0.0, 0.25, 0.5, 0.75, 1.0, 7.0])
    result = histogram(values, 0.0, 1.0, bins_per_unit=2)
    assert result.edges == [0.0, 0.5, 1.0]
    assert result.counts == [3, 4]  # -3, 0, 0.25 and 0.5, 0.75, 1, 7
    assert result.to_json() == {"edges": [0.0, 0.5, 1.0], "counts": [3, 4]}


def test_no_values_are_zeros():
    assert histogram(torch.zeros(0), -8.0, 0.0, bins_per_unit=4).counts == [0] * 32


def test_cosines_that_are_not_there_are_left_out():
    result = cosine_histogram(torch.tensor([-1.0, 0.01, 1.0, torch.nan]))
    assert len(result.counts) == 40
    assert result.edges[38] == 0.9
    assert {index for index, n in enumerate(result.counts) if n} == {0, 20, 39}
    assert sum(result.counts) == 3
