import errno
import io
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.runs import saver as saver_module
from sparsify.runs.checkpoints import load_checkpoint, save_checkpoint
from sparsify.runs.saver import CheckpointSaver
from sparsify.runs.sink import Sink
from sparsify.runs.sinks import RunFolderSink
from sparsify.settings.base_config import UserError

pytestmark = pytest.mark.fault

WEIGHTS = {"w": torch.ones(1000)}


class _SavedSink(Sink):
    def __init__(self) -> None:
        self.paths: list[str] = []

    def saved(self, path: Path) -> None:
        self.paths.append(path.name)


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """A quota of this process: no file can grow beyond it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_bytes(b"12345")
    return tmp_path


def test_what_is_written_is_a_copy_and_nobody_waits_for_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    may_write = threading.Event()

    def wait_and_save(*args: Any, **kwargs: Any) -> Path:
        assert may_write.wait(10)
        return save_checkpoint(*args, **kwargs)

    monkeypatch.setattr(saver_module, "save_checkpoint", wait_and_save)
    sink, weights = _SavedSink(), {"w": torch.ones(3)}
    index, values = torch.tensor([[0, 2]]), torch.ones(2, 4)
    gradient = torch.sparse_coo_tensor(
        index, values, (3, 4), is_coalesced=True, check_invariants=True
    )
    state = {"gradients": [gradient, None], "pair": (1, 0.5)}
    with CheckpointSaver(run_dir, 2, sink) as saver:
        saver.save(8, weights, state)
        weights["w"].zero_()
        gradient._values().zero_()
        assert not sink.paths
        may_write.set()
    assert sink.paths == ["samples_8.safetensors"]
    checkpoint = load_checkpoint(run_dir)
    torch.testing.assert_close(checkpoint.weights, {"w": torch.ones(3)})
    saved = checkpoint.state["gradients"][0]
    assert saved.is_coalesced()
    torch.testing.assert_close(saved.values(), torch.ones(2, 4))
    assert (checkpoint.state["pair"], checkpoint.state["metrics_bytes"]) == ((1, 0.5), 5)


def test_the_same_samples_are_saved_once(run_dir: Path):
    sink = _SavedSink()
    with CheckpointSaver(run_dir, 2, sink, start=8) as saver:
        for n_samples in (8, 16, 16, 24):
            saver.save(n_samples, WEIGHTS, {})
    assert sink.paths == ["samples_16.safetensors", "samples_24.safetensors"]


def test_without_a_folder_nothing_is_saved(run_dir: Path):
    with CheckpointSaver(None, 2, _SavedSink()) as saver:
        saver.finish(partial(saver.save, 8, WEIGHTS, {}))


def test_a_full_disk_is_a_warning_and_costs_no_checkpoint(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    with CheckpointSaver(run_dir, 2, Sink()) as saver:
        saver.save(8, WEIGHTS, {})
        saver._wait()
        before = {path.name for path in run_dir.iterdir()}
        for limit in (2000, 4500):  # too little for the weights, for the state
            with file_size_limit(limit):
                saver.save(16, WEIGHTS, {"moments": torch.ones(2000)})
                saver._wait()
        assert {path.name for path in run_dir.iterdir()} - before <= {"samples_16.safetensors"}
        assert load_checkpoint(run_dir).n_samples == 8
        saver.save(16, WEIGHTS, {})
    assert load_checkpoint(run_dir).n_samples == 16
    assert capsys.readouterr().err.splitlines() == 2 * [
        f"warning: save_dir: the checkpoint after 16 samples cannot be written to '{run_dir}' "
        "(File too large); the next save tries again"
    ]


def test_the_last_checkpoint_is_tried_again_until_there_is_room(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    with file_size_limit(2000), CheckpointSaver(run_dir, 2, Sink()) as saver:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        monkeypatch.setattr(
            "time.sleep",
            lambda delay: delay > 1 and resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)),
        )
        saver.finish(partial(saver.save, 8, WEIGHTS, {}))
    assert load_checkpoint(run_dir).n_samples == 8


@pytest.mark.parametrize(("start", "way_on"), [(0, "start a new run"), (8, "resume with: .*")])
def test_a_run_that_cannot_be_saved_at_its_end_is_an_error(
    start: int, way_on: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.sleep", lambda _: None)
    with CheckpointSaver(run_dir, 2, Sink()) as saver:
        saver.save(start, WEIGHTS, {})
    message = rf"^save_dir: the last steps could not be saved in '{run_dir}' \(File too large\); .*"
    with (
        file_size_limit(2000),
        CheckpointSaver(run_dir, 2, Sink(), start=start) as saver,
        pytest.raises(UserError, match=f"{message}then {way_on}"),
    ):
        saver.finish(partial(saver.save, 16, WEIGHTS, {}))


def test_a_mistake_of_the_program_is_not_taken_for_a_full_disk(run_dir: Path):
    with CheckpointSaver(run_dir, 2, Sink()) as saver:
        with pytest.raises(TypeError, match="could not be loaded again"):
            saver.finish(partial(saver.save, 8, WEIGHTS, {"thread": Path("a")}))
        saver._bug = None


def test_lines_of_a_full_disk_come_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "metrics.jsonl"
    sink = RunFolderSink(tmp_path)
    with file_size_limit(40):
        for n_samples in range(4):
            sink.log({"loss": 1.0}, n_samples)
        assert len(path.read_bytes()) == 40
        with pytest.raises(OSError, match="too large"):
            sink.flush()
    sink.log({"loss": 1.0}, 4)
    lines = [f'{{"n_samples": {n}, "loss": 1.0}}' for n in range(5)]
    assert path.read_text().splitlines() == lines
    with file_size_limit(40):
        sink.log({"loss": 1.0}, 5)
        sink.close()
    assert capsys.readouterr().err.splitlines() == [
        f"warning: save_dir: metrics cannot be written to '{path}' (File too large) and are {fate}"
        for fate in ("kept in memory until they can be", "lost")
    ]


def test_no_checkpoint_counts_whose_metrics_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sink = RunFolderSink(tmp_path)
    with CheckpointSaver(tmp_path, 2, sink) as saver:
        with file_size_limit(0):
            sink.log({"loss": 1.0}, 8)
            saver.save(8, WEIGHTS, {})
        assert saver.n_samples is None
        saver.save(8, WEIGHTS, {})
    sink.close()
    n_bytes = (tmp_path / "metrics.jsonl").stat().st_size
    assert load_checkpoint(tmp_path).state == {"metrics_bytes": n_bytes}
    assert "the checkpoint after 8 samples cannot be written" in capsys.readouterr().err


def test_a_log_on_the_full_disk_does_not_hide_the_failure(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    class _FullLog(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stderr", _FullLog())
    monkeypatch.setattr("time.sleep", lambda _: None)
    with (
        file_size_limit(2000),
        CheckpointSaver(run_dir, 2, Sink()) as saver,
        pytest.raises(UserError, match="could not be saved"),
    ):
        saver.finish(partial(saver.save, 8, WEIGHTS, {}))


def test_a_sink_that_fails_is_not_taken_for_a_full_disk(run_dir: Path):
    class _BrokenSink(Sink):
        def saved(self, path: Path) -> None:
            raise BrokenPipeError

    with CheckpointSaver(run_dir, 2, _BrokenSink()) as saver:
        with pytest.raises(BrokenPipeError):
            saver.finish(partial(saver.save, 8, WEIGHTS, {}))
        saver._bug = None
    assert load_checkpoint(run_dir).n_samples == 8
