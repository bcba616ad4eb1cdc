"""The sink that shows a run on the terminal: a progress bar, or lines of text."""

import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparsify.runs.console import say
from sparsify.runs.sink import Sink

SECONDS_BETWEEN_LINES = 10.0
MIN_BAR_COLUMNS = 8

# What people watch: a label and the metrics whose mean it shows.
WATCHED = {
    "loss": r"loss",
    "L0": r"sparsity/(train|eval)/L_0/.+",
    "KL": r"loss/(train|eval)/logits_kl",
    "CE increase": r"performance/(train|eval)/ce_loss_increase",
    "CE": r"performance/(train|eval)/ce_loss",
    "bits/byte": r"performance/(train|eval)/bits_per_byte",
}


class TerminalSink(Sink):
    """A progress bar where stderr is a terminal; elsewhere a line at most every ten seconds.

    Texts appear above the bar, and below it once all samples are done.

    Args:
        n_samples: Samples of the whole run.
        items_per_sample: Items, such as tokens, in a sample.
        start: Samples trained on before.
        item: Name of the items.
    """

    def __init__(
        self, n_samples: int, items_per_sample: int, start: int = 0, item: str = "tokens"
    ) -> None:
        self.n_samples = n_samples
        self.items_per_sample = items_per_sample
        self.item = item
        self._bar = ProgressBar(
            total=n_samples,
            initial=min(start, n_samples),
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            miniters=1,  # or a bar that was fast once would wait for many steps
        )
        self._last_line = -math.inf
        self._restart_clock(start)

    def step(self, n_samples: int) -> None:
        """Move the bar."""
        self._bar.update(min(n_samples, self.n_samples) - self._bar.n)

    def log(self, metrics: Mapping[str, float], n_samples: int) -> None:
        """Show the watched numbers. The time of an evaluation does not count as training time."""
        shown = watched_metrics(metrics)
        if "loss" not in shown:
            if shown:
                self.console(f"evaluation at {n_samples:,} samples: {_join(shown)}")
            self._restart_clock(n_samples)
            return
        seconds = time.monotonic() - self._clock_start
        rate = (n_samples - self._clock_samples) * self.items_per_sample / max(seconds, 1e-9)
        self._restart_clock(n_samples)
        numbers = [f"{label} {_short(value)}" for label, value in shown.items()]
        self._bar.numbers = [*numbers, f"{_short(rate)} {self.item}/s"]
        self.step(n_samples)
        is_due = time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        if self._bar.disable and (is_due or n_samples >= self.n_samples):
            self._last_line = time.monotonic()
            text = f"{_join(shown)}, {rate:,.0f} {self.item}/s"
            self.console(f"{n_samples:,}/{self.n_samples:,} samples: {text}")

    def console(self, text: str) -> None:
        """Print, above the progress bar unless it has come to its end."""
        if self._bar.n >= self.n_samples:
            self._close_bar()
        say(text)

    def saved(self, path: Path) -> None:
        """Print where the weights are."""
        self.console(f"saved {path}")

    def close(self, *, has_failed: bool = False) -> None:
        """Leave the progress bar as far as the run came."""
        self._close_bar()

    def _close_bar(self) -> None:
        with self._bar.get_lock():  # weights are saved in another thread
            self._bar.close()

    def _restart_clock(self, n_samples: int) -> None:
        self._clock_start = time.monotonic()
        self._clock_samples = n_samples


class ProgressBar(tqdm):
    """A bar of one line: share, bar, samples, time, and as many numbers as there is room for."""

    numbers: Sequence[str] = ()
    """The most important first: the last ones are left out where the terminal is narrow."""

    @property
    def format_dict(self) -> dict[str, Any]:  # of tqdm: what it fills into a format, and that
        """Extend tqdm's values by the longest format that fits into the line."""
        values = dict(super().format_dict)
        room = (values.get("ncols") or sys.maxsize) - MIN_BAR_COLUMNS
        text = ""
        for part in self._parts():
            without_bar = {**values, "bar_format": f"{{percentage:3.0f}}%||{text}{part}"}
            if len(self.format_meter(**without_bar)) > room:
                break
            text += part
        return {**values, "bar_format": f"{{percentage:3.0f}}%|{{bar}}|{text}"}

    def _parts(self) -> Iterator[str]:
        yield f" {self.n:,}/{self.total:,}"
        yield " [{elapsed}<{remaining}]"
        for index, number in enumerate(self.numbers):
            yield f"{', ' if index else ' '}{number}"


def watched_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers people watch, by a short label; the mean over several positions."""
    shown = {}
    for label, pattern in WATCHED.items():
        values = [float(value) for name, value in metrics.items() if re.fullmatch(pattern, name)]
        if values:
            shown[label] = sum(values) / len(values)
    return shown


def _join(shown: Mapping[str, float]) -> str:
    return ", ".join(f"{label} {value:.4g}" for label, value in shown.items())


def _short(value: float) -> str:
    """Three digits, with a `k`, `M` or `G` if the number has more before its point."""
    is_long = 999.5 <= abs(value) < math.inf
    return tqdm.format_sizeof(value) if is_long else f"{value:.3g}"
