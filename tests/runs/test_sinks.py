import json
import math
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
    sink.log({"loss": 1.0}, 8)
    sink.flush()
    sink.saved(Path("weights"))
    sink.close()
    for recording in sinks:
        assert recording.calls == [
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
    sink = TerminalSink(n_samples=100, n_ctx=8)
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
