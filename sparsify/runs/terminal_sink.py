"""What a run shows on the terminal: a progress bar, or lines of text."""

import math
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from sparsify.runs.console import say
from sparsify.runs.sink import Sink

SECONDS_BETWEEN_LINES = 10.0

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

    Args:
        n_samples: Samples of the whole run.
        n_ctx: Tokens in a sample.
        start: Samples trained on before.
    """

    def __init__(self, n_samples: int, n_ctx: int, start: int = 0) -> None:
        self.n_samples = n_samples
        self.n_ctx = n_ctx
        self._bar = tqdm(
            total=n_samples,
            initial=start,
            unit=" samples",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._last_line = -math.inf
        self._restart_clock(start)

    def log(self, metrics: Mapping[str, float], n_samples: int) -> None:
        """Show the watched numbers. Time spent on an evaluation is no training time."""
        shown = watched_metrics(metrics)
        if "loss" not in shown:
            if shown:
                self.console(f"evaluation at {n_samples:,} samples: {_join(shown)}")
            self._restart_clock(n_samples)
            return
        seconds = time.monotonic() - self._clock_start
        rate = (n_samples - self._clock_samples) * self.n_ctx / max(seconds, 1e-9)
        text = f"{_join(shown)}, {rate:,.0f} tokens/s"
        self._restart_clock(n_samples)
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(n_samples - self._bar.n)
        is_due = time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        if self._bar.disable and (is_due or n_samples >= self.n_samples):
            self._last_line = time.monotonic()
            self.console(f"{n_samples:,}/{self.n_samples:,} samples: {text}")

    def console(self, text: str) -> None:
        """Print, above the progress bar if there is one."""
        say(text)

    def saved(self, path: Path) -> None:
        """Say so."""
        self.console(f"saved {path}")

    def close(self, *, has_failed: bool = False) -> None:
        """Leave the progress bar as it stands."""
        self._bar.close()

    def _restart_clock(self, n_samples: int) -> None:
        self._clock_start = time.monotonic()
        self._clock_samples = n_samples


def watched_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The numbers people watch, by a short label; the mean where there are several positions."""
    shown = {}
    for label, pattern in WATCHED.items():
        values = [float(value) for name, value in metrics.items() if re.fullmatch(pattern, name)]
        if values:
            shown[label] = sum(values) / len(values)
    return shown


def _join(shown: Mapping[str, float]) -> str:
    return ", ".join(f"{label} {value:.4g}" for label, value in shown.items())
