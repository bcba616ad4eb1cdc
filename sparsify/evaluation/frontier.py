"""Curves of runs, and reading off them what one kind of training needs to get as far as another.

A curve is one seed's runs that differ in how sparse they are. It is read between its points and
never beyond them, along straight lines in the logarithms of both L0 and what is read there: a
sparsity coefficient moves L0 by factors, and CE increase and KL are nearly straight in them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev


@dataclass(frozen=True)
class Point:
    """One finished run with one SAE."""

    mix: str
    """Losses that it was trained on: local, e2e, ..., after its kind where there are several."""

    seed: int
    coeff: float
    """Setting that makes it sparse: k, a target for L0, or a coefficient."""

    l0: float
    alive: int
    ce_increase: float
    kl: float


@dataclass(frozen=True)
class Spread:
    """A number over several seeds."""

    mean: float
    std: float
    """Standard deviation of a sample. NaN for one seed."""

    n_seeds: int

    def __str__(self) -> str:
        """`mean ± std`, with two or three digits that matter."""
        digits = 1 if abs(self.mean) >= 10 else 2 if abs(self.mean) >= 1 else 3
        spread = "" if math.isnan(self.std) else f" ± {self.std:.{digits}f}"
        return f"{self.mean:,.{digits}f}{spread}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of at least one number."""
    return Spread(mean(values), stdev(values) if len(values) > 1 else math.nan, len(values))


Curve = Sequence[Point]
Curves = dict[str, dict[int, list[Point]]]
"""By mix and seed."""


def curves_of(points: Iterable[Point]) -> Curves:
    """The points by mix and seed, each curve from its sparsest run on."""
    found: Curves = {}
    for point in sorted(points, key=lambda point: point.l0):
        found.setdefault(point.mix, {}).setdefault(point.seed, []).append(point)
    return found


def read_all(curves: Curves, read: Callable[[Curve], float | None]) -> dict[str, list[float]]:
    """Numbers read on the curves of each mix, one for each seed, in the same order.

    Only seeds count that all mixes have, and on whose curves there is something to read in all of
    them, so that mixes are compared over the same seeds.
    """
    values = {
        mix: {seed: value for seed, curve in seeds.items() if (value := read(curve)) is not None}
        for mix, seeds in curves.items()
    }
    common = set.intersection(*map(set, values.values())) if values else set()
    return {mix: [found[seed] for seed in sorted(common)] for mix, found in values.items()}


def needed(xs: Sequence[float], ys: Sequence[float], level: float) -> float | None:
    """The smallest x at which a curve comes down through a level. None: it does nowhere.

    Args:
        xs: Positive, in rising order, such as L0.
        ys: What falls as they rise, such as the CE increase.
        level: Of y.
    """
    points = list(zip(xs, ys, strict=True))
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 >= level >= y1 and y0 > y1:
            return _on_line((y0, x0), (y1, x1), level)
    return None


def reached(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """The y of a curve at x. None: x lies outside of it.

    Args:
        xs: Positive, in rising order, such as L0.
        ys: What is read.
        x: Where.
    """
    points = list(zip(xs, ys, strict=True))
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1 and x0 < x1:
            return _on_line((x0, y0), (x1, y1), x)
    return None


def common_seeds(curves: Curves) -> list[int]:
    """Seeds that all mixes have."""
    return sorted(set.intersection(*map(set, curves.values()))) if curves else []


def common_range(curves: Curves, value: Callable[[Point], float]) -> tuple[float, float] | None:
    """The widest range of a value that the curves of all mixes with one seed have. None: none."""
    ranges = []
    for seed in common_seeds(curves):
        of_mixes = [[value(point) for point in seeds[seed]] for seeds in curves.values()]
        low, high = max(map(min, of_mixes)), min(map(max, of_mixes))
        if low <= high:
            ranges.append((low, high))
    return max(ranges, key=lambda ends: ends[1] - ends[0], default=None)


def levels(
    curves: Curves, value: Callable[[Point], float], round_numbers: Sequence[float]
) -> list[float]:
    """Levels of a value at which to compare curves: round ones in the range of all their points.

    If all curves have none of these in common, but a part of the range, its middle is one, too.

    Args:
        curves: Curves to compare.
        value: What is read of a point. Levels are positive.
        round_numbers: From 1 to below 10. Each times every power of ten is round.
    """
    values = [
        v for seeds in curves.values() for c in seeds.values() for v in map(value, c) if v > 0
    ]
    if not values:
        return []
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    candidates = [float(f"{number}e{power}") for power in powers for number in round_numbers]
    found = [level for level in candidates if low <= level <= high]
    common = common_range(curves, value)
    if common is not None and common[0] > 0:
        begin, end = common
        if not any(begin <= level <= end for level in found):
            found.append(min(max(math.sqrt(begin * end), begin), end))
    return sorted(found)


def _on_line(start: tuple[float, float], end: tuple[float, float], at: float) -> float:
    """The second coordinate where the first is `at`, on a line that is straight in logarithms.

    A coordinate that is not positive at both ends, as the CE increase of a nearly perfect SAE may
    be by chance, is taken as it is.
    """
    (a0, b0), (a1, b1) = start, end
    if at in (a0, a1):
        return b0 if at == a0 else b1  # with no rounding, so that an end lies on the curve
    if a0 > 0 and a1 > 0:
        a0, a1, at = math.log(a0), math.log(a1), math.log(at)
    share = (at - a0) / (a1 - a0)
    if b0 > 0 and b1 > 0:
        return math.exp((1 - share) * math.log(b0) + share * math.log(b1))
    return (1 - share) * b0 + share * b1


def l0_needed(curve: Curve, ce_increase: float) -> float | None:
    """Active elements per token with which a curve's SAEs come to a CE increase."""
    return needed([p.l0 for p in curve], [p.ce_increase for p in curve], ce_increase)


def l0_needed_for_kl(curve: Curve, kl: float) -> float | None:
    """Active elements per token with which a curve's SAEs come to a KL."""
    return needed([p.l0 for p in curve], [p.kl for p in curve], kl)


def alive_needed(curve: Curve, ce_increase: float) -> float | None:
    """Alive elements of a curve's SAEs where they come to a CE increase."""
    l0 = l0_needed(curve, ce_increase)
    return (
        None if l0 is None else reached([p.l0 for p in curve], [float(p.alive) for p in curve], l0)
    )


def ce_reached(curve: Curve, l0: float) -> float | None:
    """CE increase of a curve's SAEs with so many active elements per token."""
    return reached([p.l0 for p in curve], [p.ce_increase for p in curve], l0)
