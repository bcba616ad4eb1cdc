import json
import math

import pytest
import torch
from torch import Tensor

from sparsify.evaluation import geometry
from sparsify.evaluation.geometry import (
    DictionarySimilarity,
    compare_dictionaries,
    matched_cosine,
    nearest_cosine,
)

# Unit vectors of a plane at 0, 60 and 90 degrees, of which length does not matter.
PLANE = torch.tensor([[2.0, 0.0], [0.5, 0.75**0.5], [0.0, 0.1]])
HALF, HIGH = 0.5, 0.75**0.5  # cosines of 60 and of 30 degrees


def test_nearest_other_element_matches_hand_computation():
    # 0 and 90 degrees both have 60 degrees nearest; that has 90 degrees nearest.
    expected = torch.tensor([HALF, HIGH, HIGH])
    torch.testing.assert_close(nearest_cosine(PLANE), expected)


def test_nearest_of_another_dictionary_may_be_the_same_direction_or_an_opposite_one():
    others = torch.tensor([[3.0, 0.0]])
    expected = torch.tensor([1.0, HALF, 0.0])
    torch.testing.assert_close(nearest_cosine(PLANE, others), expected)
    torch.testing.assert_close(nearest_cosine(PLANE, -others), -expected)


@pytest.mark.parametrize("others", [None, torch.randn(11, 4)])
def test_chunks_change_nothing(others: Tensor | None):
    elements = torch.randn(23, 4)
    whole = nearest_cosine(elements, others)
    for chunk_size in (1, 7, 23):
        torch.testing.assert_close(nearest_cosine(elements, others, chunk_size), whole)


def test_without_another_element_there_is_no_nearest():
    assert nearest_cosine(torch.ones(1, 4)).isnan().tolist() == [True]
    assert nearest_cosine(torch.ones(2, 4), torch.ones(0, 4)).isnan().tolist() == [True, True]
    assert nearest_cosine(torch.ones(0, 4)).tolist() == []


def test_a_repeated_element_is_its_own_nearest():
    elements = torch.randn(5, 4)
    nearest = nearest_cosine(torch.cat([elements, elements]))
    torch.testing.assert_close(nearest, torch.ones(10))
    assert nearest.max() <= 1


def test_each_element_is_matched_once():
    # b has 0 and 10 degrees. The best partner of 0 degrees is 0, but then 60 degrees gets 10 (the
    # cosine of 50 degrees), and 90 degrees nobody.
    degrees = torch.tensor([0.0, 10.0]).deg2rad()
    b = torch.stack([degrees.cos(), degrees.sin()], dim=1)
    expected = torch.tensor([1.0, math.cos(math.radians(50))])
    torch.testing.assert_close(matched_cosine(PLANE, b), expected)


def test_matching_has_the_largest_sum_and_not_the_nearest_first():
    # Greedy: a0-b0 (0.9), which leaves a1-b1 (0). Instead 0.8 + 0.8.
    a = torch.eye(2)
    b = torch.tensor([[0.9, 0.8], [0.8, 0.0]])
    lengths = b.norm(dim=1)
    expected = 0.8 / lengths  # a1-b0 and a0-b1
    assert matched_cosine(a, b).sum().item() == pytest.approx(expected.sum().item())


def test_numbers_of_two_dictionaries_match_hand_computation():
    similarity = DictionarySimilarity(
        a_to_b=torch.tensor([1.0, 0.91, 0.5, 0.9]),
        b_to_a=torch.tensor([1.0, 0.0]),
        matched=torch.tensor([0.95, 0.85]),
    )
    assert similarity.metrics() == pytest.approx(
        {
            "nearest_cosine/a_to_b": 0.8275,  # 3.31 / 4
            "nearest_cosine/b_to_a": 0.5,
            "matched_cosine": 0.9,
            "nearest_share_above_0.9/a_to_b": 0.5,
            "nearest_share_above_0.9/b_to_a": 0.5,
            "matched_share_above_0.9": 0.5,
        }
    )


def test_a_permuted_dictionary_is_the_same():
    a = torch.randn(40, 8)
    similarity = compare_dictionaries(a, a[torch.randperm(40)])
    assert list(similarity.metrics().values()) == pytest.approx([1.0] * 6)


def test_random_dictionaries_are_not_the_same():
    metrics = compare_dictionaries(torch.randn(20, 64), torch.randn(30, 64)).metrics()
    assert metrics["matched_cosine"] < metrics["nearest_cosine/a_to_b"] < 0.9
    assert metrics["nearest_share_above_0.9/b_to_a"] == 0


def test_json_holds_numbers_and_histograms():
    a, b = torch.randn(5, 4), torch.randn(3, 4)
    similarity = compare_dictionaries(a, b)
    content = json.loads(json.dumps(similarity.to_json(), allow_nan=False))
    assert content["metrics"] == similarity.metrics()
    assert (content["n_elements_a"], content["n_elements_b"]) == (5, 3)
    assert sum(content["histograms"]["nearest_cosine/a_to_b"]["counts"]) == 5
    assert sum(content["histograms"]["nearest_cosine/b_to_a"]["counts"]) == 3


def test_a_dictionary_without_elements_is_like_no_other():
    similarity = compare_dictionaries(torch.ones(0, 4), torch.randn(3, 4))
    content = json.loads(json.dumps(similarity.to_json(), allow_nan=False))
    share = content["metrics"].pop("nearest_share_above_0.9/b_to_a")
    assert share == 0
    assert set(content["metrics"].values()) == {None}


def test_large_dictionaries_are_not_matched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(geometry, "MAX_MATCHED", 4)
    small, large = torch.randn(4, 3), torch.randn(5, 3)
    assert compare_dictionaries(small, small).matched is not None
    similarity = compare_dictionaries(small, large)
    assert similarity.matched is None
    assert "matched_cosine" not in similarity.metrics()
