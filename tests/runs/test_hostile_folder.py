"""A run folder of somebody else is refused or resumed, and nothing outside it changes.

None may hang, fill memory or end in anything but one message.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from example_runs import N_DONE, SAERun, sae_run_config
from safetensors.torch import load_file

from sparsify.runs.lifecycle import run_training
from sparsify.runs.run_folder import read_result, write_text
from sparsify.runs.weight_files import load_metadata, load_weights
from sparsify.settings.base_config import UserError, read_yaml

pytestmark = [pytest.mark.fault, pytest.mark.skipif(os.name == "nt", reason="no pipes there")]

SPARSE_BYTES = 40_000_000_000
MANIFEST = f"checkpoint_{N_DONE}.json"
STATE = f"state_{N_DONE}.pt"
WEIGHTS = f"samples_{N_DONE}.safetensors"
READ = (MANIFEST, STATE, WEIGHTS, "final_config.yaml", "metrics.jsonl")
WRITTEN = (*READ, ".lock", "eval.json", "samples_32.safetensors", "state_32.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of 32 samples that has been saved after 20."""
    run = SAERun(sae_run_config(tmp_path_factory.mktemp("whole")))
    run_training(run)
    assert run.run_dir is not None
    return run.run_dir


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    """A run that is to be resumed after 20 samples."""
    folder = shutil.copytree(whole, tmp_path / "runs" / "run")
    (folder / "checkpoint_32.json").unlink()
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that must not change, with a copy of each file of the run."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "victim").write_text("untouched")
    yield folder
    assert (folder / "victim").read_text() == "untouched"


@pytest.fixture(autouse=True)
def _is_quick() -> Iterator[None]:
    """End a test that hangs, as at a pipe, with an error."""

    def stop(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SPARSE_BYTES)


def folder(path: Path) -> None:
    path.mkdir()


def unix_socket(path: Path) -> None:
    # Its path must be short.
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def ring(path: Path) -> None:
    path.symlink_to(path)


ODD: tuple[Callable[[Path], None], ...] = (
    *(pipe, device, sparse, folder, unix_socket, dangling, ring),
)


def resume(run_dir: Path) -> None:
    run_training(SAERun(sae_run_config(run_dir.parent, resume=run_dir)))


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("put", ODD)
def test_what_is_no_file_is_not_read(put: Callable[[Path], None], name: str, run_dir: Path):
    (run_dir / name).unlink()
    put(run_dir / name)
    with suppress(UserError):
        resume(run_dir)
        pytest.fail("it was taken for a file")


@pytest.mark.parametrize("name", [".lock", "eval.json", "training.png", ".metrics.jsonl.1.tmp"])
@pytest.mark.parametrize("put", [pipe, device, folder, unix_socket, dangling, ring])
def test_what_is_no_file_is_not_written(put: Callable[[Path], None], name: str, run_dir: Path):
    (run_dir / name).unlink(missing_ok=True)
    put(run_dir / name)
    with pytest.raises(UserError, match=r"is a link|is a folder|is a pipe or a device|cannot writ"):
        resume(run_dir)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_with_another_name_elsewhere_is_replaced(name: str, run_dir: Path, outside: Path):
    (run_dir / name).touch()
    os.link(run_dir / name, outside / "other")
    before = (outside / "other").read_bytes()
    resume(run_dir)
    assert (outside / "other").read_bytes() == before
    assert (run_dir / "samples_32.safetensors").stat().st_size > 0


@pytest.mark.parametrize("name", WRITTEN)
def test_a_link_to_elsewhere_is_refused_or_replaced(name: str, run_dir: Path, outside: Path):
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(outside / "victim")
    with suppress(UserError):
        resume(run_dir)


def test_a_link_to_a_folder_elsewhere_is_refused(run_dir: Path, outside: Path):
    (run_dir / "more").mkdir()
    (run_dir / "more" / "model").symlink_to(outside)
    with pytest.raises(UserError, match="is a link, through which the run would write outside"):
        resume(run_dir)


def test_a_temporary_file_cannot_be_foreseen(tmp_path: Path, outside: Path):
    for number in (os.getpid(), os.getppid()):
        (tmp_path / f".a.json.{number}.tmp").symlink_to(outside / "victim")
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert not (tmp_path / "a.json").is_symlink()


@pytest.mark.parametrize("read", [read_yaml, load_weights, load_metadata])
@pytest.mark.parametrize("put", ODD)
def test_each_reader_refuses_what_is_no_file(
    put: Callable[[Path], None], read: Callable[[Path], object], tmp_path: Path
):
    path = tmp_path / "a.safetensors"
    put(path)
    with pytest.raises(UserError, match=str(path)):
        read(path)


@pytest.mark.parametrize("put", ODD)
def test_a_result_that_is_no_file_is_refused(put: Callable[[Path], None], tmp_path: Path):
    put(tmp_path / "eval.json")
    with pytest.raises(UserError, match=r"eval\.json: cannot be read"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "{", "{}", "[" * 100_000, '{"metrics": []}', '{"metrics": {"a": "b"}}'],
)
def test_a_damaged_result_is_refused(content: str, tmp_path: Path):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(UserError, match=r"eval\.json: is damaged"):
        read_result(tmp_path)


# Metrics

TAILS = {
    "no JSON": b"\x00\xff{{{",
    "no UTF-8": b'{"n_samples": 20, "\xff\xfe": 1}\n',
    "NULs": bytes(5000),
    "half a line": b'{"n_samples": 20, "lo',
    "no object": b"[1, 2]\n3\n",
    "no count": b'{"loss": 1}\n',
    "texts": b'{"n_samples": 20, "loss": "a"}\n',
    "a long line": b'{"n_samples": 20, "loss": 1' + b" " * 11_000_000,
    "brackets": b"[" * 200_000 + b"\n",
    "long numbers": b'{"n_samples": 20, "loss": ' + b"9" * 6000 + b"}\n",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_damaged_lines_at_the_end_of_metrics_are_cut_off(
    tail: bytes, whole: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    lines = (whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:3])
    (run_dir / "metrics.jsonl").write_bytes(kept + tail)
    state = torch.load(run_dir / STATE, weights_only=True)
    reseal(run_dir, {**state, "metrics_bytes": len(kept + tail)})
    resume(run_dir)
    assert "its last lines are damaged and have been cut off" in capsys.readouterr().err
    assert (run_dir / "metrics.jsonl").read_bytes() == kept + b"".join(lines[5:])
    torch.testing.assert_close(
        load_file(run_dir / "samples_32.safetensors"),
        load_file(whole / "samples_32.safetensors"),
        rtol=0,
        atol=0,
    )


def test_a_length_within_a_line_cuts_that_line(whole: Path, run_dir: Path):
    content = (whole / "metrics.jsonl").read_bytes()
    state = torch.load(run_dir / STATE, weights_only=True)
    reseal(run_dir, {**state, "metrics_bytes": state["metrics_bytes"] - 5})
    resume(run_dir)
    lines = content.splitlines(keepends=True)
    assert (run_dir / "metrics.jsonl").read_bytes() == b"".join(lines[:4] + lines[5:])


def reseal(run_dir: Path, state: object) -> None:
    """Put another state there, with its checksum."""
    torch.save(state, run_dir / STATE)
    sums = {
        name: hashlib.sha256((run_dir / name).read_bytes()).hexdigest() for name in (WEIGHTS, STATE)
    }
    (run_dir / MANIFEST).write_text(json.dumps({"n_samples": N_DONE, "sha256": sums}))
