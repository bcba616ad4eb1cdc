import json
import os
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest
import torch

from sparsify.runs.run_folder import write_config
from sparsify.runs.saver import CheckpointSaver
from sparsify.runs.sink import Sink
from sparsify.runs.sinks import open_sinks
from sparsify.runs.wandb_sink import WandbSink
from sparsify.settings.base_config import UserError
from sparsify.training.config import TrainingConfig

CONFIG = TrainingConfig(n_samples=1000, batch_size=10, lr=1e-3, wandb_project="sparsify-test")
KEY = "0123456789abcdef" * 3
TOKEN = "hf_" + "Zx9" * 10

STARTED = {
    "bucket": {
        "id": "1",
        "name": "run",
        "displayName": "run",
        "config": "{}",
        "historyLineCount": 0,
        "project": {"id": "2", "name": "p", "entity": {"id": "3", "name": "e"}},
    },
    "inserted": True,
}

# Each starts wandb's own process.
pytestmark = [pytest.mark.fault, pytest.mark.slow]


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder with a config; wandb starts again without what this user has set up."""
    import wandb

    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder, CONFIG)
    wandb.teardown()
    yield folder
    wandb.teardown()


class Service(ThreadingHTTPServer):
    """Stands in for wandb's service, on this machine.

    Args:
        answer: Status of every answer; None never answers.
        body: What comes with it.
        starts_runs: A run is started all the same.
    """

    daemon_threads = True

    def __init__(self, answer: int | None, body: str, *, starts_runs: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.body = body.encode()
        self.starts_runs = starts_runs
        self.is_over = Event()


class _Handler(BaseHTTPRequestHandler):
    server: Service  # pyright: ignore[reportIncompatibleVariableOverride]  (declared wider)

    def do_POST(self) -> None:
        request = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if b"query Viewer" in request:  # wandb waits ten seconds for this one, whatever is set
            self._send(200, b'{"data": {"viewer": null}}')
        elif self.server.starts_runs and b"mutation UpsertBucket" in request:
            self._send(200, json.dumps({"data": {"upsertBucket": STARTED}}).encode())
        elif self.server.answer is None:
            self.server.is_over.wait()
        else:
            self._send(self.server.answer, self.server.body)

    def do_GET(self) -> None:
        self.do_POST()

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service that answers as the test's parameter says, and that wandb is told to use."""
    server = Service(*request.param[:2], starts_runs=request.param[2:] == (True,))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    yield server
    server.is_over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def warnings_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def metrics_of(run_dir: Path) -> list[Any]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def files_with_secrets(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    secrets = (KEY.encode(), TOKEN.encode())
    return [str(path) for path in files if any(secret in path.read_bytes() for secret in secrets)]


def save(sink: Sink, run_dir: Path, n_samples: int) -> None:
    with CheckpointSaver(run_dir, 1, sink) as saver:
        saver.save(n_samples, {"w": torch.ones(1)}, {})


def train(run_dir: Path, *, n_steps: int = 3) -> None:
    with open_sinks(CONFIG, run_name="run", run_dir=run_dir, items_per_sample=8) as sink:
        for n_samples in range(10, 10 * n_steps + 1, 10):
            sink.log({"loss": 1 / n_samples}, n_samples)
        save(sink, run_dir, 10 * n_steps)


def test_wandb_gets_metrics_by_samples_and_the_files(
    run_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_ENTITY", "team")
    (run_dir / "samples_40.safetensors").write_bytes(b"weights")
    sink = WandbSink(CONFIG, "name", run_dir)
    run = sink._run
    assert run is not None
    sink.log({"loss": 0.5}, 40)
    sink.saved(run_dir / "samples_40.safetensors")
    assert (run.project, run.entity, run.name) == ("sparsify-test", "team", "name")
    assert run.config["batch_size"] == 10
    sink.log({"loss": 0.25}, 50)  # a step is over when the next one begins
    assert (run.summary["loss"], run.summary["_step"]) == (0.5, 40)
    sink.close()
    [folder] = run_dir.glob("wandb/offline-run-*")
    assert (folder / "files" / "final_config.yaml").read_text().startswith("n_samples: 1000")
    assert (folder / "files" / "samples_40.safetensors").read_bytes() == b"weights"
    assert "warn" not in capfd.readouterr().err.lower()  # nor has wandb any
    assert files_with_secrets(run_dir) == []


@pytest.mark.parametrize(
    "service", [(500, "broken"), (None, "")], ids=["fails", "hangs"], indirect=True
)
def test_a_service_that_cannot_be_reached_is_one_warning(
    service: Service, run_dir: Path, capfd: pytest.CaptureFixture[str]
):
    train(run_dir)
    [warning] = warnings_of(capfd.readouterr().err)
    [folder] = run_dir.glob("wandb/offline-run-*")
    assert warning.startswith("warning: wandb_project: wandb cannot be reached (")
    assert warning.endswith(f"send it later with `wandb sync {folder}`")
    assert (folder / "files" / "samples_30.safetensors").exists()
    assert [line["n_samples"] for line in metrics_of(run_dir)] == [10, 20, 30]
    assert files_with_secrets(run_dir) == []


@pytest.mark.parametrize("service", [(500, "")], indirect=True)
def test_nobody_logged_in_is_an_error_for_a_person(
    service: Service, run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(
        UserError, match=r"wandb_project: .*No API key configured.*WANDB_MODE=offline"
    ):
        WandbSink(CONFIG, "run", run_dir)


@pytest.mark.parametrize(
    "service", [(403, json.dumps({"errors": [{"message": f"bad key {KEY}"}]}))], indirect=True
)
def test_a_service_that_refuses_is_an_error_without_the_key(service: Service, run_dir: Path):
    with pytest.raises(UserError, match=r"could be started \(bad key \[redacted\]\); set WANDB_AP"):
        WandbSink(CONFIG, "run", run_dir)
    assert files_with_secrets(run_dir) == []


def test_unknown_setting_of_the_environment_is_an_error_for_a_person(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_MODE", "of-line")
    with pytest.raises(UserError, match=r"could be started \(.*of-line") as error:
        WandbSink(CONFIG, "run", run_dir)
    assert "WANDB_API_KEY" not in str(error.value)


def kill_wandb() -> None:
    """End the process that wandb works in, as the system does when memory runs out."""
    processes = [p for p in psutil.Process().children() if p.name().startswith("wandb-core")]
    assert processes
    for process in processes:
        process.kill()
        process.wait()
    time.sleep(0.1)  # until the connection to it is known to be lost


def test_wandb_that_dies_in_the_middle_is_one_warning(
    run_dir: Path, capfd: pytest.CaptureFixture[str]
):
    with open_sinks(CONFIG, run_name="run", run_dir=run_dir, items_per_sample=8) as sink:
        sink.log({"loss": 1.0}, 10)
        kill_wandb()
        for n_samples in (20, 30, 40):
            sink.log({"loss": 1.0}, n_samples)
        save(sink, run_dir, 40)
    printed = capfd.readouterr().err
    [warning] = warnings_of(printed)
    [folder] = run_dir.glob("wandb/offline-run-*")
    assert warning.startswith("warning: wandb_project: wandb failed and gets nothing from here on")
    assert f"kept in {run_dir}. " in warning
    assert warning.endswith(f"`wandb sync {folder}`")
    assert "Traceback" not in printed
    assert [line["n_samples"] for line in metrics_of(run_dir)] == [10, 20, 30, 40]
    assert (run_dir / "samples_40.safetensors").exists()


def test_wandb_that_dies_before_it_is_closed_leaves_the_error_of_the_training(
    run_dir: Path, capfd: pytest.CaptureFixture[str]
):

    def fail() -> None:
        with open_sinks(CONFIG, run_name="run", run_dir=run_dir, items_per_sample=8) as sink:
            sink.log({"loss": 1.0}, 10)
            kill_wandb()
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as error:
        fail()
    assert error.value.__context__ is None
    assert len(warnings_of(capfd.readouterr().err)) == 1


@pytest.mark.parametrize("service", [(500, "broken", True)], indirect=True)
def test_a_service_that_goes_away_in_the_middle_does_not_keep_the_run_from_ending(
    service: Service, run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "30")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    start = time.monotonic()
    train(run_dir)
    assert time.monotonic() - start < 20
    assert len(metrics_of(run_dir)) == 3
    assert list(run_dir.glob("wandb/run-*"))  # not offline: it had been started


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_log_that_is_a_link_is_not_written_through(
    link: Callable[[Path, Path], None], run_dir: Path, tmp_path_factory: pytest.TempPathFactory
):
    outside = tmp_path_factory.mktemp("outside")
    for name in ("kept.txt", "kept.log"):
        (outside / name).write_text(f"key {KEY}")
        log = run_dir / "wandb" / "planted" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        link(log, outside / name)
    os.mkfifo(run_dir / "wandb" / "planted" / "pipe.log")
    train(run_dir)
    assert (outside / "kept.txt").read_text() == f"key {KEY}"
    assert (outside / "kept.log").read_text() == f"key {KEY}"
