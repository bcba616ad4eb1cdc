"""Reading curves of runs."""

import math

import pytest

from sparsify.evaluation.frontier import (
    Point,
    alive_needed,
    ce_reached,
    curves_of,
    l0_needed,
    l0_needed_for_kl,
    needed,
    reached,
    read_all,
    spread,
)


def point(mix: str, seed: int, l0: float, ce: float, alive: int = 100) -> Point:
    return Point(mix=mix, seed=seed, coeff=1.0, l0=float(l0), alive=alive, ce_increase=ce, kl=ce)


def test_a_curve_is_read_on_straight_lines_in_both_logarithms():
    # Half-way down from 0.4 to 0.1 is 0.2, and from 10 to 40 it is 20.
    assert needed([10.0, 40.0, 80.0], [0.4, 0.1, 0.05], 0.2) == pytest.approx(20)
    assert reached([10.0, 40.0, 80.0], [0.4, 0.1, 0.05], 20.0) == pytest.approx(0.2)
    assert needed([10.0, 40.0, 80.0], [0.4, 0.1, 0.05], 0.1) == pytest.approx(40)
    assert reached([10.0, 40.0, 80.0], [0.4, 0.1, 0.05], 80.0) == pytest.approx(0.05)


def test_what_is_not_positive_is_read_as_it_is():
    # Half-way from 0.4 down to -0.2 is 0.1; of L0 it is the geometric mean.
    assert needed([10.0, 40.0], [0.4, -0.2], 0.1) == pytest.approx(20)
    assert reached([10.0, 40.0], [0.4, -0.2], 20.0) == pytest.approx(0.1)


def test_ends_lie_on_a_curve():
    # 57.3 is no number that exp(log(x)) gives back.
    curve = [point("local", 0, 10, 0.4, 200), point("local", 0, 57.3, 0.1, 800)]
    assert math.exp(math.log(57.3)) != 57.3
    assert l0_needed(curve, 0.1) == 57.3
    assert alive_needed(curve, 0.1) == 800


def test_a_curve_is_not_read_beyond_its_ends():
    assert needed([10.0, 40.0], [0.4, 0.1], 0.41) is None
    assert needed([10.0, 40.0], [0.4, 0.1], 0.09) is None
    assert reached([10.0, 40.0], [0.4, 0.1], 9.0) is None
    assert reached([10.0, 40.0], [0.4, 0.1], 41.0) is None


def test_where_a_curve_crosses_a_level_twice_the_sparser_point_counts():
    # Down at 0.2 between 10 and 40, up again, and down for good between 80 and 160.
    assert needed([10.0, 40.0, 80.0, 160.0], [0.4, 0.1, 0.3, 0.1], 0.2) == pytest.approx(20)


def test_alive_elements_are_those_where_the_level_is_reached():
    curve = [point("local", 0, 10, 0.4, 200), point("local", 0, 40, 0.1, 800)]
    assert l0_needed(curve, 0.2) == l0_needed_for_kl(curve, 0.2) == pytest.approx(20)
    assert alive_needed(curve, 0.2) == pytest.approx(400)
    assert alive_needed(curve, 0.5) is None
    assert ce_reached(curve, 20.0) == pytest.approx(0.2)


def test_mixes_are_compared_over_the_seeds_that_all_have():
    points = [
        *(point("local", seed, l0, ce) for seed in (0, 1, 2) for l0, ce in ((40, 0.2), (10, 0.4))),
        *(point("e2e", seed, l0, ce / 2) for seed in (1, 0) for l0, ce in ((10, 0.4), (40, 0.2))),
        *(point("e2e", 2, l0, 1.0) for l0 in (10, 40)),  # never down at the level
    ]
    found = curves_of(points)
    assert [p.l0 for p in found["local"][0]] == [10.0, 40.0]
    values = read_all(found, lambda curve: l0_needed(curve, 0.2))
    assert values == {"local": pytest.approx([40, 40]), "e2e": pytest.approx([10, 10])}
    assert read_all({}, lambda curve: 1.0) == {}


def test_spread_is_that_of_a_sample():
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.std, found.n_seeds) == (2.0, pytest.approx(1.0), 3)
    assert str(found) == "2.00 ± 1.00"
    assert str(spread([1234.56])) == "1,234.6"
