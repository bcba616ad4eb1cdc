import errno
import io
import json
from pathlib import Path

import pytest
import torch

from sparsify.runs.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from sparsify.runs.resume import clear_what_came_after
from sparsify.settings.base_config import UserError
from sparsify.settings.files import read_text

pytestmark = pytest.mark.fault


def save(run_dir: Path, n_samples: int, keep_last: int = 2) -> None:
    weights = {"w": torch.full((1000,), float(n_samples))}
    save_checkpoint(run_dir, n_samples, weights, {"n": n_samples}, keep_last=keep_last)


def names(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir()}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save(tmp_path, 8)
    save(tmp_path, 100)
    return tmp_path


def test_the_newest_is_loaded(run_dir: Path):
    checkpoint = load_checkpoint(run_dir)
    assert (checkpoint.n_samples, checkpoint.state, checkpoint.damaged) == (100, {"n": 100}, [])
    torch.testing.assert_close(checkpoint.weights, {"w": torch.full((1000,), 100.0)})


def test_only_the_last_keep_their_state_and_all_their_weights(run_dir: Path):
    save(run_dir, 200)
    assert names(run_dir) == {
        "samples_8.safetensors",
        *("samples_100.safetensors", "state_100.pt", "checkpoint_100.json"),
        *("samples_200.safetensors", "state_200.pt", "checkpoint_200.json"),
    }


@pytest.mark.parametrize("file", ["checkpoint_8.json", "samples_8.safetensors", "state_8.pt"])
def test_any_file_of_a_checkpoint_chooses_it(file: str, run_dir: Path):
    assert load_checkpoint(run_dir / file).n_samples == 8


@pytest.mark.parametrize("name", ["samples_100.safetensors", "state_100.pt"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 1.0])
def test_a_flipped_bit_is_found_anywhere(name: str, where: float, run_dir: Path):
    path = run_dir / name
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    checkpoint = load_checkpoint(run_dir)
    assert checkpoint.n_samples == 8
    (message,) = checkpoint.damaged
    assert message.startswith(f"{path}: is damaged")
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["samples_100.safetensors", "state_100.pt"])
def test_a_missing_file_is_found(name: str, run_dir: Path):
    (run_dir / name).unlink()
    checkpoint = load_checkpoint(run_dir)
    assert checkpoint.n_samples == 8
    assert checkpoint.damaged == [f"{run_dir / name}: is missing"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"sha256": 3}',
        '{"sha256": {}}',
        json.dumps({"sha256": {"../../etc/passwd": ""}}),
        "\x00" * 50,
        "[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_found(content: str, run_dir: Path):
    path = run_dir / "checkpoint_100.json"
    path.write_text(content)
    checkpoint = load_checkpoint(run_dir)
    assert (checkpoint.n_samples, checkpoint.damaged) == (8, [f"{path}: is damaged"])


def test_without_its_manifest_a_checkpoint_is_none(run_dir: Path):
    (run_dir / "checkpoint_100.json").unlink()
    assert load_checkpoint(run_dir).n_samples == 8


def test_a_folder_without_whole_checkpoints_says_what_is_wrong_with_each(run_dir: Path):
    (run_dir / "state_8.pt").unlink()
    (run_dir / "checkpoint_100.json").write_text("{")
    message = (
        r"(?s)^resume: '.*' holds no whole checkpoint to resume from; start a new run"
        r".*checkpoint_100.json: is damaged.*state_8.pt: is missing"
    )
    with pytest.raises(UserError, match=message):
        load_checkpoint(run_dir)


def test_a_read_that_fails_gives_no_checkpoint_up(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path) -> str:
        if path.name == "checkpoint_100.json":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read_text(path)

    monkeypatch.setattr("sparsify.runs.checkpoints.read_text", fail)
    with pytest.raises(UserError, match=r"checkpoint_100.json: cannot be read .*; try again"):
        load_checkpoint(run_dir)


def test_a_checkpoint_whose_state_was_dropped_says_so(run_dir: Path):
    save(run_dir, 200)
    message = (
        r"^resume: '.*' has no training state any more, .* resume from one of 200, 100 samples"
    )
    with pytest.raises(UserError, match=message):
        load_checkpoint(run_dir / "samples_8.safetensors")


def test_states_that_a_crash_left_without_a_manifest_are_removed(run_dir: Path):
    (run_dir / "state_50.pt").touch()
    save(run_dir, 200)
    assert not (run_dir / "state_50.pt").exists()


def test_what_came_after_is_put_aside(run_dir: Path):
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text('{"n_samples": 8}\n{"n_samples": 100}\n')
    clear_what_came_after(Checkpoint(run_dir, 8, {}, {"metrics_bytes": 17}, []), metrics)
    assert metrics.read_text() == '{"n_samples": 8}\n'
    assert names(run_dir) == {
        "metrics.jsonl",
        *("samples_8.safetensors", "state_8.pt", "checkpoint_8.json"),
        *("abandoned_samples_100.safetensors", "abandoned_state_100.pt"),
        "abandoned_checkpoint_100.json",
    }
    assert load_checkpoint(run_dir).n_samples == 8


def test_there_must_be_a_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"^resume: there is no folder '.*no'; give the folder of"):
        load_checkpoint(tmp_path / "no")


def test_what_cannot_be_read_now_is_not_given_up(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path, **_: object) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr("torch.load", fail)
    with pytest.raises(UserError, match=r"state_100\.pt: .*can't allocate memory"):
        load_checkpoint(run_dir)


@pytest.mark.parametrize("n_bytes", [None, -5, "a"])
def test_a_state_without_the_length_of_the_metrics_moves_nothing(n_bytes: object, run_dir: Path):
    before = names(run_dir)
    checkpoint = Checkpoint(run_dir, 8, {}, {"metrics_bytes": n_bytes}, [])
    with pytest.raises(UserError, match=r"does not say how long metrics.jsonl was"):
        clear_what_came_after(checkpoint, run_dir / "metrics.jsonl")
    assert names(run_dir) == before


def test_missing_lines_of_metrics_are_told(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text('{"n_samples": 8}\n')
    clear_what_came_after(Checkpoint(run_dir, 8, {}, {"metrics_bytes": 99}, []), metrics)
    assert capsys.readouterr().err == f"warning: {metrics}: lines of it are missing\n"
    assert metrics.read_text() == '{"n_samples": 8}\n'


def test_a_warning_that_nobody_can_read_stops_no_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    class _ClosedTerminal(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sys.stderr", _ClosedTerminal())
    checkpoint = Checkpoint(run_dir, 8, {}, {"metrics_bytes": 99}, [])
    clear_what_came_after(checkpoint, run_dir / "metrics.jsonl")
    assert "abandoned_checkpoint_100.json" in names(run_dir)
