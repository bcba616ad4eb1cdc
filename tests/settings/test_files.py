"""A file is opened if it is one, and no larger than expected."""

import os
import threading
from pathlib import Path

import pytest

from sparsify.settings.files import open_regular, read_text


def test_what_a_file_or_a_link_to_it_holds_is_read(tmp_path: Path):
    (path := tmp_path / "a.txt").write_text("ü\n", encoding="utf-8")
    (link := tmp_path / "link").symlink_to(path)
    assert [read_text(path), read_text(link)] == ["ü\n", "ü\n"]
    with open_regular(path, max_bytes=3) as file:
        assert file.read() == b"\xc3\xbc\n"


def test_a_larger_file_is_refused_with_its_size(tmp_path: Path):
    with (path := tmp_path / "sparse").open("wb") as file:
        file.truncate(40 * 2**30)  # takes no room on the disk
    with pytest.raises(OSError, match="it has 42,949,672,960 bytes, and at most 1,000,000 were"):
        read_text(path)
    open_regular(path).close()


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(path := tmp_path / "pipe")
    errors: list[OSError] = []

    def read() -> None:
        try:
            open_regular(path)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert [error.strerror for error in errors] == ["it is a pipe or a device, not a file"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (Path("/dev/zero"), "it is a pipe or a device"),
        (Path("/"), "Is a directory"),
        (Path("/nowhere/at/all"), "No such file"),
    ],
)
def test_what_is_no_file_is_refused(path: Path, reason: str):
    with pytest.raises(OSError, match=reason) as caught:
        open_regular(path)
    assert caught.value.filename == str(path)


def test_a_text_that_is_not_utf_8_is_an_error_of_its_own(tmp_path: Path):
    (path := tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(path)
