import fcntl
import json
import math
import os
import pty
import struct
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify.runs.sink import Sink
from sparsify.runs.sinks import CompositeSink, RunFolderSink, open_sinks
from sparsify.runs.terminal_sink import TerminalSink, watched_metrics
from sparsify.training.config import TrainingConfig

CONFIG = TrainingConfig(n_samples=1000, batch_size=10, lr=1e-3, wandb_project="sparsify-test")


class _RecordingSink(Sink):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def step(self, n_samples: int) -> None:
        self.calls.append(("step", n_samples))

    def log(self, metrics: Any, n_samples: int) -> None:
        self.calls.append(("log", dict(metrics), n_samples))

    def flush(self) -> None:
        self.calls.append("flush")

    def saved(self, path: Path) -> None:
        self.calls.append(("saved", path))

    def close(self, *, has_failed: bool = False) -> None:
        self.calls.append(("close", has_failed))


def test_metrics_file_has_one_object_per_line_at_once(tmp_path: Path):
    sink = RunFolderSink(tmp_path)
    sink.log({"loss": 0.5, "worst": math.inf, "missing": math.nan}, 8)
    sink.log({"loss": 0.25}, 16)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"n_samples": 8, "loss": 0.5, "worst": None, "missing": None},
        {"n_samples": 16, "loss": 0.25},
    ]
    sink.close()


def test_metrics_of_a_resumed_run_are_appended(tmp_path: Path):
    for n_samples in (8, 16):
        sink = RunFolderSink(tmp_path)
        sink.log({"loss": 1.0}, n_samples)
        sink.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_composite_hands_on_everything():
    sinks = [_RecordingSink(), _RecordingSink()]
    sink = CompositeSink(*sinks)
    sink.step(8)
    sink.log({"loss": 1.0}, 8)
    sink.flush()
    sink.saved(Path("weights"))
    sink.close()
    for recording in sinks:
        assert recording.calls == [
            ("step", 8),
            ("log", {"loss": 1.0}, 8),
            "flush",
            ("saved", Path("weights")),
            ("close", False),
        ]


def test_watched_metrics_are_means_over_positions():
    metrics = {
        "loss": 2.0,
        "loss/train/logits_kl": 0.5,
        "loss/train/sparsity/blocks.0.hook_resid_pre": 9.0,
        "sparsity/train/L_0/blocks.0.hook_resid_pre": 10.0,
        "sparsity/train/L_0/blocks.1.hook_resid_pre": 20.0,
    }
    assert watched_metrics(metrics) == {"loss": 2.0, "L0": 15.0, "KL": 0.5}


def test_terminal_shows_speed_and_watched_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    sink = TerminalSink(n_samples=100, items_per_sample=8)
    now = 2.0
    sink.log({"loss": 0.5}, 10)  # 10 samples of 8 tokens in 2 seconds
    now = 4.0
    sink.log({"loss": 0.4}, 20)  # less than ten seconds after the last line
    now = 50.0
    sink.log({"performance/eval/ce_loss_increase": 0.125}, 20)
    now = 51.0
    sink.log({"loss": 0.3}, 30)  # the evaluation does not count as training time
    sink.close()
    assert capsys.readouterr().err.splitlines() == [
        "10/100 samples: loss 0.5, 40 tokens/s",
        "evaluation at 20 samples: CE increase 0.125",
        "30/100 samples: loss 0.3, 80 tokens/s",
    ]


class _Terminal:
    """A pseudo-terminal and what a person sees on it: `stderr` of this process while it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n_columns: int) -> None:
        self.n_columns = n_columns
        self._keyboard, screen = pty.openpty()
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, n_columns, 0, 0))
        self._file = os.fdopen(screen, "w", encoding="utf-8")
        monkeypatch.setattr("sys.stderr", self._file)
        self._received = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while received := os.read(self._keyboard, 4096):
                self._received += received
        except OSError:  # Linux's way to say that the other side is closed
            pass

    def lines(self) -> list[str]:
        """Close the terminal; returns what stands on it."""
        self._file.close()
        self._reader.join()
        os.close(self._keyboard)
        lines, column = [""], 0
        for character in self._received.decode():
            if character == "\r":
                column = 0
            elif character == "\n":
                lines.append("")
            else:
                if column == self.n_columns:
                    lines, column = [*lines, ""], 0
                line = lines[-1].ljust(column)
                lines[-1] = line[:column] + character + line[column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]


METRICS = {
    "loss": 2.31512,
    "sparsity/train/L_0/blocks.0.hook_resid_pre": 1453.26,
    "loss/train/logits_kl": 0.31234,
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return what stands on a terminal after something was done with a sink on it."""

    def see(
        act: Callable[[TerminalSink], object], n_columns: int = 80, **of_sink: int
    ) -> list[str]:
        now = [100.0]
        terminal = _Terminal(monkeypatch, n_columns)
        for clock in ("tqdm.std.time", "time.monotonic"):  # each look at it takes a second
            monkeypatch.setattr(clock, lambda: now.append(now[-1] + 1) or now[-1])
        options: dict[str, Any] = {"n_samples": 240, "items_per_sample": 4096, **of_sink}
        sink = TerminalSink(**options)
        act(sink)
        return terminal.lines()

    return see


def test_bar_moves_with_each_step(seen: Callable[..., list[str]]):
    (line,) = seen(lambda sink: sink.step(16))
    assert line.startswith("  7%|")
    assert "| 16/240 [00:0" in line


@pytest.mark.parametrize(
    ("n_columns", "numbers"),
    [
        (31, ""),
        (45, " ["),
        (80, "] loss 2.32, L0 1.45k, KL 0.312"),
        (120, "] loss 2.32, L0 1.45k, KL 0.312, 262M tokens/s"),
    ],
)
def test_bar_fits_the_terminal(n_columns: int, numbers: str, seen: Callable[..., list[str]]):
    def train(sink: TerminalSink) -> None:
        sink.log(METRICS, 128_000)  # 64,000 samples of 4,096 tokens in a second
        sink.step(128_016)

    start = {"n_samples": 256_000, "start": 64_000}
    (line,) = seen(train, n_columns, **start)
    assert len(line) <= n_columns
    head, bar, text = line.split("|")
    assert head == " 50%"
    assert len(bar) >= 8
    assert text.startswith(" 128,016/256,000")
    assert numbers in text


def test_texts_stand_above_the_bar_and_below_it_once_it_is_full(seen: Callable[..., list[str]]):
    def train(sink: TerminalSink) -> None:
        sink.step(224)
        sink.saved(Path("weights"))
        sink.step(240)
        sink.log(METRICS, 240)
        sink.log({"performance/eval/ce_loss_increase": 0.5}, 240)
        sink.close()

    above, bar, *below = seen(train)
    assert above == "saved weights"
    assert bar.startswith("100%|█")
    assert "| 240/240 [" in bar
    assert "loss 2.32" in bar
    assert below == ["evaluation at 240 samples: CE increase 0.5", ""]


@pytest.mark.parametrize("n_samples", [96, 240])
def test_closed_bar_shows_how_far_the_run_came(n_samples: int, seen: Callable[..., list[str]]):
    def train(sink: TerminalSink) -> None:
        sink.step(n_samples)
        sink.close()

    bar, last = seen(train)
    assert f"| {n_samples}/240 [" in bar
    assert last == ""


def test_step_costs_microseconds(monkeypatch: pytest.MonkeyPatch):
    terminal = _Terminal(monkeypatch, 80)
    sink = TerminalSink(n_samples=20_000, items_per_sample=8)
    start = time.perf_counter()
    for n_samples in range(20_000):
        sink.step(n_samples)
    seconds = time.perf_counter() - start
    sink.close()
    terminal.lines()
    assert seconds / 20_000 < 50e-6  # 1e-6 on an idle machine


@pytest.mark.parametrize("fails", [False, True])
def test_sinks_are_closed_whatever_happens(fails: bool, monkeypatch: pytest.MonkeyPatch):
    recording = _RecordingSink()
    monkeypatch.setattr("sparsify.runs.sinks.WandbSink", lambda *_: recording)
    try:
        with open_sinks(CONFIG, run_name="run", run_dir=None, items_per_sample=8) as sink:
            sink.log({"loss": 1.0}, 1000)
            if fails:
                raise RuntimeError("a bug")
    except RuntimeError:
        assert fails
    assert recording.calls == [("log", {"loss": 1.0}, 1000), ("close", fails)]
