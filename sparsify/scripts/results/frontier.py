"""The frontier of finished runs: what each mix of losses needs to come as far as the others."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.evaluation.frontier import (
    Curve,
    Curves,
    Point,
    Spread,
    alive_needed,
    ce_reached,
    common_range,
    common_seeds,
    curves_of,
    l0_needed,
    l0_needed_for_kl,
    levels,
    read_all,
    spread,
)
from sparsify.runs.config import SAERunConfig
from sparsify.runs.run_folder import (
    CONFIG_FILE,
    RESULT_FILE,
    read_result,
    replace_atomically,
    write_text,
)
from sparsify.scripts.cli import read_sae_run
from sparsify.scripts.tables import markdown_table
from sparsify.settings.base_config import UserError, read_yaml
from sparsify.settings.differences import differing_settings
from sparsify.settings.terminal import report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

MIXES = ("local", "e2e", "e2e-local", "e2e-downstream")
LOSS_LEVELS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
L0_LEVELS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
COMPARED_AT: dict[str, tuple[Callable[[Point], float], Sequence[float]]] = {
    "CE increase": (lambda point: point.ce_increase, LOSS_LEVELS),
    "KL": (lambda point: point.kl, LOSS_LEVELS),
    "L0": (lambda point: point.l0, L0_LEVELS),
}
"""Numbers at equal values of which mixes are compared, and which of their values are round."""

MAY_DIFFER = {
    "seed",
    "loss.sparsity.coeff",
    "loss.sparsity.target_l0",
    "saes.k",
    "save_dir",
    "wandb_run_name",
}
"""Settings in which the runs of one curve may differ."""

Row = dict[str, float | int | None]


def write_frontier(runs: Sequence[Path], n_planned: int, folder: Path) -> list[str]:
    """Compare some finished runs, of `n_planned`; writes the result, returns it as tables."""
    points = points_of(runs)
    found = curves_of(points)
    folder.mkdir(parents=True, exist_ok=True)
    rows = json.dumps(frontier_rows(found), indent=1)
    write_text(folder / "frontier.json", f"{rows}\n")
    rows = json.dumps([asdict(point) for point in points], indent=1)
    write_text(folder / "frontier_points.json", f"{rows}\n")
    plot_frontier(found, folder / "frontier.png")
    return [f"{len(points)} of {n_planned} runs.", "", *frontier_tables(found)]


def points_of(runs: Sequence[Path]) -> list[Point]:
    """Return the points of some finished runs, each with one SAE; says which have none.

    Raises:
        UserError: Runs of one curve differ in more than their seed and what makes them sparse.
    """
    configs = {run: read_sae_run(run) for run in runs}
    kinds = {config.saes.kind for config in configs.values()}
    first: dict[str, Path] = {}
    points = []
    for run, config in configs.items():
        name = config.mix if len(kinds) == 1 else f"{config.saes.kind} {config.mix}"
        check_alike(first.setdefault(name, run), run)
        point = point_of(name, config, run)
        if point is None:
            report(f"left out: {run}, whose L0 is 0, or which has numbers that are not finite")
        else:
            points.append(point)
    return points


def check_alike(first: Path, run: Path) -> None:
    """Raise a `UserError` if two runs do not belong to one curve."""
    before, now = read_yaml(first / CONFIG_FILE), read_yaml(run / CONFIG_FILE)
    found = [
        one
        for one in differing_settings("", before, now)
        if one.partition(":")[0] not in MAY_DIFFER
    ]
    if found:
        raise UserError(
            f"{run}: is not of one curve with {first}, as it has {', '.join(found)}; compare "
            "runs that differ in their seed and in how sparse they are"
        )


def point_of(name: str, config: SAERunConfig, run: Path) -> Point | None:
    """Return the point of a finished run. None: it is not finite, or nothing is active.

    Raises:
        UserError: It has several SAEs.
    """
    evaluation = read_result(run)
    metrics, positions = evaluation["metrics"], list(evaluation.get("n_dict") or ())
    if len(positions) > 1:
        raise UserError(
            f"{run}: has SAEs at {', '.join(positions)}, but runs with one are compared; leave it "
            "out"
        )
    sparsity = config.loss.sparsity
    coeffs = [config.saes.n_active, sparsity and (sparsity.target_l0 or sparsity.coeff)]
    try:
        l0 = metrics[f"sparsity/eval/L_0/{positions[0]}"]
        ce_increase = metrics["performance/eval/ce_loss_increase"]
        kl = metrics["loss/eval/logits_kl"]
        alive = metrics[f"sparsity/alive_dict_elements/{positions[0]}"]
    except LookupError as error:
        raise UserError(
            f"{run / RESULT_FILE}: has no {error} of one SAE; evaluate the run again"
        ) from None
    if not l0 or ce_increase is None or kl is None or alive is None:
        return None
    return Point(
        mix=name,
        seed=config.seed,
        coeff=float(next(filter(None, coeffs), 0.0)),
        l0=l0,
        alive=int(alive),
        ce_increase=ce_increase,
        kl=kl,
    )


def frontier_rows(curves: Curves) -> list[Row]:
    """Mean L0 that each mix needs at the same CE increase, where all that there are come to it."""
    rows: list[Row] = []
    for level in levels(curves, *COMPARED_AT["CE increase"]):
        values = read_all(curves, partial(l0_needed, ce_increase=level))
        n_seeds = min(map(len, values.values()), default=0)
        if n_seeds > 0:
            row: Row = {"at_ce_increase": level}
            for mix in dict.fromkeys([*MIXES, *curves]):
                l0 = spread(values[mix]).mean if mix in values else None
                row["l0_" + mix.replace("-", "_").replace(" ", "_")] = l0
            rows.append({**row, "n_seeds": n_seeds})
    return rows


def frontier_tables(curves: Curves) -> list[str]:
    """Tables of what each mix needs at equal CE increase or KL, and reaches at equal L0."""
    return [
        *_table(curves, "CE increase", "L0", l0_needed),
        "",
        *_table(curves, "KL", "L0", l0_needed_for_kl),
        "",
        *_table(curves, "CE increase", "alive", alive_needed),
        "",
        *_table(curves, "L0", "CE increase", ce_reached),
    ]


def _table(
    curves: Curves, at: str, what: str, read: Callable[[Curve, float], float | None]
) -> list[str]:
    """Spreads over seeds by mix, and of the ratios to the first, where there is one in each."""
    first, *others = mixes = _mixes(curves)
    rows = []
    for level in levels(curves, *COMPARED_AT[at]):
        values = read_all(curves, lambda curve, level=level: read(curve, level))
        if all(values.values()) and min(values[first]) > 0:
            ratios = [
                [a / b for a, b in zip(values[mix], values[first], strict=True)] for mix in others
            ]
            spreads = map(spread, [*(values[mix] for mix in mixes), *ratios])
            rows.append([f"{level:.4g}", *map(str, spreads), str(len(values[first]))])
    ratio_names = [f"{mix} ÷ {first}" for mix in others]
    header = [f"at {at}", *(f"{what} {mix}" for mix in mixes), *ratio_names, "seeds"]
    return markdown_table(header, rows) if rows else _why_nothing(curves, at, what)


def _why_nothing(curves: Curves, at: str, what: str) -> list[str]:
    """Why there is nothing to compare."""
    value, _ = COMPARED_AT[at]
    if not common_seeds(curves):
        reason = "the mixes have no seed in common"
    elif common_range(curves, value) is None:
        reason = f"of no seed the curves of all mixes have a {at} in common"
    else:
        reason = f"between its points, no curve of some mix has {what} to read"
    lines = [f"{what} at equal {at}: {reason}, so there is nothing to compare."]
    for mix in _mixes(curves):
        seeds = curves[mix]
        found = [value(point) for curve in seeds.values() for point in curve]
        lines.append(
            f"- {mix}: seeds {', '.join(map(str, sorted(seeds)))}, {at} {min(found):.4g} to "
            f"{max(found):.4g}"
        )
    return lines


def _mixes(curves: Curves) -> list[str]:
    """Mixes of the curves, in order."""
    return [*(mix for mix in MIXES if mix in curves), *sorted(set(curves) - set(MIXES))]


def plot_frontier(curves: Curves, path: Path) -> None:
    """Draw CE increase against L0 and against alive elements, and KL against L0, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    panels = [("l0", "ce_increase"), ("alive", "ce_increase"), ("l0", "kl")]
    for axis, (x, y) in zip(axes, panels, strict=True):
        _draw(axis, curves, x, y)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    with replace_atomically(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


NAMES = {
    "l0": "L0: active elements per token",
    "alive": "alive elements",
    "ce_increase": "CE increase, nats per token",
    "kl": "KL(raw || spliced), nats per token",
}


def _draw(axis: "Axes", curves: Curves, x: str, y: str) -> None:
    """A line of means over seeds for each mix, with standard deviations as bars."""
    for mix in _mixes(curves):
        by_coeff: dict[float, list[Point]] = {}
        for curve in curves[mix].values():
            for point in curve:
                by_coeff.setdefault(point.coeff, []).append(point)
        at = {coeff: _spread_of(points, x) for coeff, points in by_coeff.items()}
        value = {coeff: _spread_of(points, y) for coeff, points in by_coeff.items()}
        coeffs = sorted(by_coeff, key=lambda coeff: at[coeff].mean)
        axis.errorbar(
            [at[coeff].mean for coeff in coeffs],
            [value[coeff].mean for coeff in coeffs],
            xerr=[at[coeff].std for coeff in coeffs],
            yerr=[value[coeff].std for coeff in coeffs],
            marker="o",
            markersize=4,
            capsize=2,
            label=mix,
        )
    points = [point for seeds in curves.values() for curve in seeds.values() for point in curve]
    if all(getattr(point, x) > 0 for point in points):
        _make_logarithmic(axis.set_xscale, axis.xaxis)
    if all(getattr(point, y) > 0 for point in points):
        _make_logarithmic(axis.set_yscale, axis.yaxis)
    axis.set_xlabel(NAMES[x])
    axis.set_ylabel(NAMES[y])
    axis.grid(alpha=0.25)


def _make_logarithmic(set_scale: Callable[[str], None], axis: "Axis") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _spread_of(points: Sequence[Point], name: str) -> Spread:
    return spread([float(getattr(point, name)) for point in points])
