import json
import sysconfig
from pathlib import Path

import pytest

from sparsify.data.python_stdlib import iter_files, split_of


def test_splits_are_disjoint_and_together_are_the_library():
    train, validation = set(iter_files("train")), set(iter_files("validation"))
    root = Path(sysconfig.get_path("stdlib"))
    assert not train & validation
    assert Path(json.__file__) in train | validation
    names = {path.relative_to(root).as_posix() for path in train | validation}
    assert {"ast.py", "asyncio/events.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name for name in names)
    assert 0.02 < len(validation) / len(names) < 0.08


def test_split_is_a_function_of_the_relative_path():
    # First 8 bytes of the SHA-256 of the path, modulo 100: 96 and 2; below 5 is validation
    assert split_of("ast.py") == "train"
    assert split_of("_threading_local.py") == "validation"


def test_files_come_in_the_order_of_their_paths():
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in iter_files("train")]
    assert names == sorted(names)


def test_other_packages_and_other_files_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "site-packages").mkdir()
    for name in ("site-packages/other.py", "read.txt", "own.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert iter_files("train") + iter_files("validation") == [tmp_path / "own.py"]
