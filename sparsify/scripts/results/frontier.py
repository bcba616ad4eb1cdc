"""The frontier of finished runs: what each mix of losses needs to come as far as the others."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.base_config import UserError
from sparsify.evaluation.frontier import (
    Curve,
    Curves,
    Point,
    alive_needed,
    ce_reached,
    l0_needed,
    read_all,
    spread,
)
from sparsify.scripts.tables import markdown_table
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.scripts.train_tlens_saes.jobs import RESULT_FILE, Job, known_runs
from sparsify.training.run_folder import replace_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIXES = ("local", "e2e", "e2e-downstream")
CE_LEVELS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0)
"""CE increases at which mixes are compared, where their curves come to them."""
L0_LEVELS = (5.0, 10.0, 20.0, 30.0, 40.0, 60.0, 80.0, 120.0, 160.0, 240.0)
"""The same of L0."""

Row = dict[str, float | int | None]


def points_of(jobs: Iterable[Job]) -> list[Point]:
    """The finished runs of some jobs, each with one SAE."""
    jobs = list(jobs)
    known = known_runs(jobs)
    return [point_of(job.config, run) for job in jobs if (run := known.finished(job)) is not None]


def point_of(config: Config, run: Path) -> Point:
    """What is compared of a finished run.

    Raises:
        UserError: It has several SAEs.
    """
    evaluation: dict[str, Any] = json.loads((run / RESULT_FILE).read_text(encoding="utf-8"))
    metrics, positions = evaluation["metrics"], list(evaluation["n_dict"])
    if len(positions) > 1:
        raise UserError(
            f"{run}: has SAEs at {', '.join(positions)}, but runs with one are compared; leave it "
            "out"
        )
    sparsity = config.loss.sparsity
    return Point(
        mix=config.mix,
        seed=config.seed,
        coeff=float(getattr(config.saes, "k", None) or (sparsity.coeff if sparsity else 0.0)),
        l0=metrics[f"sparsity/eval/L_0/{positions[0]}"],
        alive=int(metrics[f"sparsity/alive_dict_elements/{positions[0]}"]),
        ce_increase=metrics["performance/eval/ce_loss_increase"],
        kl=metrics["loss/eval/logits_kl"],
    )


def frontier_rows(curves: Curves) -> list[Row]:
    """Mean L0 that each mix needs at the same CE increase, where all that there are come to it."""
    rows: list[Row] = []
    for level in CE_LEVELS:
        values = read_all(curves, partial(l0_needed, ce_increase=level))
        n_seeds = min(map(len, values.values()), default=0)
        if n_seeds > 0:
            row: Row = {"at_ce_increase": level}
            for mix in MIXES:
                l0 = spread(values[mix]).mean if mix in values else None
                row[f"l0_{mix.replace('-', '_')}"] = l0
            rows.append({**row, "n_seeds": n_seeds})
    return rows


def frontier_tables(curves: Curves) -> list[str]:
    """What each mix needs at the same CE increase, and how far it comes at the same L0."""
    at_ce = [(f"{level:g}", partial(l0_needed, ce_increase=level)) for level in CE_LEVELS]
    alive = [(f"{level:g}", partial(alive_needed, ce_increase=level)) for level in CE_LEVELS]
    at_l0 = [(f"{level:g}", partial(ce_reached, l0=level)) for level in L0_LEVELS]
    return [
        *_table(curves, "at CE increase", "L0", at_ce),
        "",
        *_table(curves, "at CE increase", "alive", alive),
        "",
        *_table(curves, "at L0", "CE increase", at_l0),
    ]


def _table(
    curves: Curves, at: str, what: str, reads: Iterable[tuple[str, Callable[[Curve], float | None]]]
) -> list[str]:
    """Spreads over seeds by mix, and of the ratios to the first, where there is one in each."""
    first, *others = mixes = _mixes(curves)
    rows = []
    for level, read in reads:
        values = read_all(curves, read)
        if all(values.values()):
            ratios = [
                [a / b for a, b in zip(values[mix], values[first], strict=True)] for mix in others
            ]
            spreads = map(spread, [*(values[mix] for mix in mixes), *ratios])
            rows.append([level, *map(str, spreads), str(len(values[first]))])
    ratio_names = [f"{mix} ÷ {first}" for mix in others]
    header = [at, *(f"{what} {mix}" for mix in mixes), *ratio_names, "seeds"]
    return markdown_table(header, rows)


def _mixes(curves: Curves) -> list[str]:
    """Those that there are, in order."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
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
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for mix in _mixes(curves):
        by_coeff: dict[float, list[Point]] = {}
        for curve in curves[mix].values():
            for point in curve:
                by_coeff.setdefault(point.coeff, []).append(point)
        spreads = sorted(
            [
                (
                    spread([float(getattr(point, x)) for point in points]),
                    spread([float(getattr(point, y)) for point in points]),
                )
                for points in by_coeff.values()
            ],
            key=lambda pair: pair[0].mean,
        )
        axis.errorbar(
            [at.mean for at, _ in spreads],
            [value.mean for _, value in spreads],
            xerr=[at.std for at, _ in spreads],
            yerr=[value.std for _, value in spreads],
            marker="o",
            markersize=4,
            capsize=2,
            label=mix,
        )
    for scale, axes in ((axis.set_xscale, axis.xaxis), (axis.set_yscale, axis.yaxis)):
        scale("log")
        axes.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_minor_formatter(NullFormatter())
    axis.set_xlabel(NAMES[x])
    axis.set_ylabel(NAMES[y])
    axis.grid(alpha=0.25)
