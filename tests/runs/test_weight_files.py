import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsify.runs import weight_files as checkpoints
from sparsify.runs.weight_files import (
    latest_checkpoint,
    load_metadata,
    load_state,
    load_weights,
    save_state,
    save_weights,
)
from sparsify.settings.base_config import UserError


class _Hostile:
    """Makes a file called `planted` when it is unpickled."""

    def __init__(self, planted: Path) -> None:
        self.planted = planted

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.planted}",)


def test_weights_are_the_same_after_loading(tmp_path: Path):
    weights = {"a.weight": torch.randn(3, 4).T, "a.bias": torch.nn.Parameter(torch.randn(4))}
    path = save_weights(tmp_path, weights, 120, {"model": "tiny"})
    assert path == tmp_path / "samples_120.safetensors"
    torch.testing.assert_close(load_weights(path), {k: v.detach() for k, v in weights.items()})
    assert load_metadata(path) == {"model": "tiny"}


def test_pt_state_dict_is_read(tmp_path: Path):
    linear = torch.nn.Linear(2, 3)
    torch.save(linear.state_dict(), tmp_path / "samples_1.pt")
    assert load_weights(tmp_path / "samples_1.pt").keys() == {"weight", "bias"}
    assert load_metadata(tmp_path / "samples_1.pt") == {}


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickled_code_is_refused_and_not_executed(is_zip: bool, tmp_path: Path):
    planted = tmp_path / "planted"
    path = tmp_path / "samples_1.pt"
    content = {"weight": torch.ones(1), "x": _Hostile(planted)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match=r"pickled code 'posix.system', which is never executed"):
        load_weights(path)
    path.rename(tmp_path / "state_1.pt")
    with pytest.raises(UserError, match="never executed"):
        load_state(tmp_path / "state_1.pt")
    assert not planted.exists()


@pytest.mark.parametrize("name", ["samples_1.safetensors", "samples_1.pt"])
@pytest.mark.parametrize("damage", ["half", "empty", "text"])
def test_damaged_file_is_one_message(name: str, damage: str, tmp_path: Path):
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save({"weight": torch.randn(1000)}, path)
    else:
        save_weights(tmp_path, {"weight": torch.randn(1000)}, 1)
    content = path.read_bytes()
    path.write_bytes(
        {"half": content[: len(content) // 2], "empty": b"", "text": b"hello\n"}[damage]
    )
    with pytest.raises(UserError, match=f"{name}: is damaged or no weights file") as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)


def test_other_content_is_refused(tmp_path: Path):
    torch.save({"step": 3}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds more than named tensors"):
        load_weights(tmp_path / "a.pt")
    with pytest.raises(UserError, match="there is no such file"):
        load_weights(tmp_path / "b.pt")
    (tmp_path / "c.npz").touch()
    with pytest.raises(UserError, match=r"are read from \.safetensors and \.pt"):
        load_weights(tmp_path / "c.npz")


def test_failing_save_leaves_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_weights(tmp_path, {"w": torch.ones(2)}, 8)

    def fail_half_way(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fail_half_way)
    with pytest.raises(OSError, match="No space left"):
        save_weights(tmp_path, {"w": torch.zeros(2)}, 8)
    torch.testing.assert_close(load_weights(path), {"w": torch.ones(2)})
    assert list(tmp_path.iterdir()) == [path]


def test_latest_checkpoint_has_the_largest_count(tmp_path: Path):
    for name in ("samples_9.pt", "samples_100.pt", "samples_20.safetensors", "other_300.pt"):
        (tmp_path / name).touch()
    assert latest_checkpoint(tmp_path).name == "samples_100.pt"
    (tmp_path / "samples_100.safetensors").touch()
    assert latest_checkpoint(tmp_path).name == "samples_100.safetensors"


def test_folder_without_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="holds no samples_"):
        latest_checkpoint(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        latest_checkpoint(tmp_path / "missing")


def test_state_that_could_not_be_loaded_is_refused_when_saved(tmp_path: Path):
    path = save_state(tmp_path, 8, {"n": 8})
    with pytest.raises(TypeError, match="could not be loaded again"):
        save_state(tmp_path, 16, {"path": tmp_path})
    assert list(tmp_path.iterdir()) == [path]
    assert load_state(path) == {"n": 8}


def test_weights_may_be_read_by_whoever_may_read_other_files(tmp_path: Path):
    (tmp_path / "other").touch()
    path = save_weights(tmp_path, {"a": torch.ones(2)}, 4)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
