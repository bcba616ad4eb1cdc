"""Sinks of a run. The loop reports to one and does not know which.

To report to another service, write a sink here and open it in `open_sinks`.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sparsify.runs.console import say
from sparsify.runs.run_folder import METRICS_FILE
from sparsify.runs.sink import Sink
from sparsify.runs.terminal_sink import TerminalSink
from sparsify.runs.wandb_sink import WandbSink
from sparsify.training.config import TrainingConfig


class CompositeSink(Sink):
    """Hands everything to several sinks, in their order."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def step(self, n_samples: int) -> None:
        """Hand on how far the run is."""
        for sink in self.sinks:
            sink.step(n_samples)

    def log(self, metrics: Mapping[str, float], n_samples: int) -> None:
        """Hand on numbers."""
        for sink in self.sinks:
            sink.log(metrics, n_samples)

    def console(self, text: str) -> None:
        """Hand on a text."""
        for sink in self.sinks:
            sink.console(text)

    def flush(self) -> None:
        """Hand on."""
        for sink in self.sinks:
            sink.flush()

    def saved(self, path: Path) -> None:
        """Hand on where weights are."""
        for sink in self.sinks:
            sink.saved(path)

    def close(self, *, has_failed: bool = False) -> None:
        """Close all."""
        for sink in self.sinks:
            sink.close(has_failed=has_failed)


class RunFolderSink(Sink):
    """Writes `metrics.jsonl`.

    A line is one JSON object: `n_samples` and the metrics. A number that is not finite, which JSON
    cannot hold, becomes null. What cannot be written, as on a full disk, is kept and tried again.

    Args:
        run_dir: Folder of the run. Lines are appended to a file that is already there.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = (run_dir / METRICS_FILE).open("ab", buffering=0)
        self._pending = b""
        self._is_warned = False

    def log(self, metrics: Mapping[str, float], n_samples: int) -> None:
        """Append a line."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._pending += json.dumps({"n_samples": n_samples, **finite}).encode() + b"\n"
        self._write_or_warn("kept in memory until they can be")

    def flush(self) -> None:
        """See that all lines are on disk."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self, *, has_failed: bool = False) -> None:
        """Close the file."""
        self._is_warned = False
        self._write_or_warn("lost")
        self._file.close()

    def _write(self) -> None:
        while self._pending:  # A disk that becomes full takes a part.
            self._pending = self._pending[self._file.write(self._pending) :]

    def _write_or_warn(self, fate: str) -> None:
        try:
            self._write()
        except OSError as error:
            if not self._is_warned:
                say(
                    f"warning: save_dir: metrics cannot be written to '{self._file.name}' "
                    f"({error.strerror}) and are {fate}"
                )
            self._is_warned = True


def report_early_end(sink: Sink, n_samples: int, n_wanted: int, trained: str) -> None:
    """Say so, on the terminal and in the log, if the data ended before `n_wanted` samples.

    `trained` says what learned from them, as in "the model was".
    """
    if n_samples < n_wanted:
        sink.log({"train_data_ended_early": 1.0}, n_samples)
        sink.console(
            f"train_data: ended after {n_samples:,} of {n_wanted:,} samples, on which {trained} "
            "trained; give more data, or set train_data.n_epochs to repeat them"
        )


@contextmanager
def open_sinks(
    config: TrainingConfig,
    *,
    run_name: str,
    run_dir: Path | None,
    items_per_sample: int,
    item: str = "tokens",
    start: int = 0,
) -> Iterator[Sink]:
    """The sinks that a config asks for, as one, closed when the block ends.

    Args:
        config: Whether there is a wandb project, and how long the run is.
        run_name: Name of the run, without a time.
        run_dir: Folder of the run, with its config written. None: no files.
        items_per_sample: Items in a sample, for the speed that is shown.
        item: Name of the items.
        start: Samples trained on before, in a resumed run.
    """
    sinks: list[Sink] = []
    has_failed = True
    try:
        if run_dir is not None:
            sinks.append(RunFolderSink(run_dir))
        if config.wandb_project is not None:
            sinks.append(WandbSink(config, run_name, run_dir))
        sinks.append(
            TerminalSink(config.n_batches * config.batch_size, items_per_sample, start, item)
        )
        yield CompositeSink(*sinks)
        has_failed = False
    finally:
        for sink in reversed(sinks):
            sink.close(has_failed=has_failed)
