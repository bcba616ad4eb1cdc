"""A picture of a training run against samples.

For SAEs: every loss term, L0, KL and CE increase. For a language model: CE, bits per byte and the
learning rate.
"""

import math
import re
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.runs.metrics_file import read_metrics
from sparsify.runs.run_folder import METRICS_FILE, replace_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FILE = "training.png"

# Metric name: family, train or eval, quantity, and a hook position where it has one. Others, which
# a file of somebody else may have, are not drawn: matplotlib reads formulas in them.
METRIC_NAME = re.compile(
    r"(loss|sparsity|performance)/(train|eval)/(\w{1,100})(?:/([\w.]{1,200}))?", re.ASCII
)
MAX_PANELS = 40
"""More quantities than a run logs."""
TITLES = {
    "loss": "total loss (weighted)",
    "sparsity": "sparsity term",
    "out_to_in": "out_to_in: error at the SAE",
    "in_to_orig": "in_to_orig: error downstream",
    "out_to_orig": "out_to_orig: error at the SAE",
    "logits_kl": "KL(raw || spliced), nats per token",
    "L_0": "L0: active elements per token",
    "ce_loss_increase": "CE increase, nats per token",
    "ce_loss": "CE, nats per token",
    "bits_per_byte": "bits per byte of text",
    "lr": "learning rate",
}

# Values by samples, of one (phase, position).
Series = dict[int, float]
Panels = dict[str, dict[tuple[str, str], Series]]


def plot_training(run_dir: Path) -> Path | None:
    """Draw `metrics.jsonl` of a run as `training.png`.

    Returns:
        Path of the picture. None if matplotlib is not installed or there is nothing to draw.
    """
    panels = collect_panels(run_dir / METRICS_FILE)
    if find_spec("matplotlib") is None or not panels:
        return None
    # The Agg canvas draws without a display, and leaves the caller's pyplot alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_columns = min((3, 4), key=lambda n: -len(panels) % n)  # fewest empty places
    n_rows = math.ceil(len(panels) / n_columns)
    figure = Figure(figsize=(4.4 * n_columns, 3.1 * n_rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    colors = _position_colors(panels)
    end = max(n for series in panels.values() for points in series.values() for n in points)
    margin = 0.03 * max(end, 1)
    for axis, (quantity, series) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, TITLES.get(quantity, quantity), series, colors)
        axis.set_xlim(-margin, end + margin)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles = _legend_handles(panels, colors)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(run_dir.resolve().name, fontsize=11)
    path = run_dir / PLOT_FILE
    with replace_atomically(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return path


def collect_panels(metrics_path: Path) -> Panels:
    """Return the series of a metrics file by quantity: all loss terms, and those in `TITLES`.

    Quantities come in the order of `TITLES`, positions by depth. Where a resumed run has measured
    something twice, the later value counts.
    """
    panels: Panels = defaultdict(lambda: defaultdict(dict))
    has_saes = False
    for record in read_metrics(metrics_path):
        n_samples = int(record.pop("n_samples") or 0)
        for name, value in record.items():
            match = METRIC_NAME.fullmatch(name)
            family, phase, quantity, position = match.groups() if match else ("", "train", name, "")
            has_saes |= family in ("loss", "sparsity")
            if value is not None and (family == "loss" or quantity in TITLES):
                panels[quantity][phase, position or ""][n_samples] = value
    if has_saes:
        panels.pop("lr", None)
    elif "loss" in panels:  # of a language model: the CE of the training text
        panels["ce_loss"].update(panels.pop("loss"))
    ordered = [name for name in TITLES if name in panels] + [
        name for name in panels if name not in TITLES
    ]
    return {
        quantity: dict(sorted(panels[quantity].items(), key=lambda item: _depth(item[0][1])))
        for quantity in ordered[:MAX_PANELS]
    }


def _depth(position: str) -> list[tuple[int, str]]:
    """Sort `blocks.2` before `blocks.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in position.split(".")]


def _position_colors(panels: Panels) -> dict[str, str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    positions = {position for series in panels.values() for _, position in series if position}
    ordered = sorted(positions, key=_depth)
    name, n_colors = ("tab10", 10) if len(ordered) <= 10 else ("viridis", len(ordered))
    colormap = colormaps[name].resampled(n_colors)
    palette = [to_hex(colormap(index)) for index in range(len(ordered))]
    return {"": "0.25"} | dict(zip(ordered, palette, strict=True))


def _draw_panel(
    axis: "Axes", title: str, series: dict[tuple[str, str], Series], colors: dict[str, str]
) -> None:
    """Draw train as a thin line, or a dash if it is one point; held-out data as dots."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    for (phase, position), by_samples in series.items():
        x, y = zip(*sorted(by_samples.items()), strict=True)
        if phase == "train":
            marker = "_" if len(x) == 1 else ""  # a line of one point would be invisible
            style = {"marker": marker, "markersize": 12, "linewidth": 1, "alpha": 0.75}
            axis.plot(x, y, color=colors[position], **style)
        else:
            axis.plot(x, y, color=colors[position], linestyle=":", linewidth=1, zorder=3)
            axis.scatter(x, y, s=26, color=colors[position], edgecolors="white", zorder=4)
    values = [value for by_samples in series.values() for value in by_samples.values()]
    if min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("samples", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _legend_handles(panels: Panels, colors: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    phases = {phase for series in panels.values() for phase, _ in series}
    styles = {
        "train": Line2D([], [], color="0.25", linewidth=1, label="train"),
        "eval": Line2D([], [], color="0.25", linestyle=":", marker="o", label="held out"),
    }
    return [styles[phase] for phase in styles if phase in phases] + [
        Line2D([], [], color=color, linewidth=4, label=position)
        for position, color in colors.items()
        if position
    ]
