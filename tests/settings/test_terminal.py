"""Texts that act on no terminal, and streams that end no run."""

import io
import logging
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.runs.console import say
from sparsify.settings.base_config import BaseConfig, dump_yaml, nearest, read_yaml, validate_config
from sparsify.settings.terminal import (
    MessageFormatter,
    as_message,
    can_write,
    escaped,
    forgiving_streams,
    printable,
    report,
    tell,
)

HOSTILE = {
    "clears the screen": ("\x1b[2J", r"\x1b[2J"),
    "sets the title": ("\x1b]0;x\x07", r"\x1b]0;x\x07"),
    "in eight bits": ("\x9b2J", r"\x9b2J"),
    "overwrites the line": ("\rerror", r"\rerror"),
    "goes back": ("\x08\x08", r"\x08\x08"),
    "deletes": ("\x7f", r"\x7f"),
    "ends the text": ("\x00", r"\x00"),
    "turns the direction": ("\u202e", r"\u202e"),
    "isolates": ("\u2066x\u2069", r"\u2066x\u2069"),
    "marks": ("\u200f", r"\u200f"),
    "has no width": ("\u200b", r"\u200b"),
    "separates lines": ("\u2028", r"\u2028"),
    "next line": ("\x85", r"\x85"),
    "feeds": ("\x0b\x0c", r"\x0b\x0c"),
    "half a character": ("\udcff", r"\udcff"),
    "private": ("\ue000", r"\ue000"),
    "tag": ("\U000e0041", r"\U000e0041"),
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.values(), ids=HOSTILE)
def test_what_a_terminal_obeys_is_an_escape(text: str, shown: str):
    assert escaped(f"a{text}b") == printable(f"a{text}b") == f"a{shown}b"


@pytest.mark.parametrize("text", ["plain", "naïve Ünï", "日本語", "שלום", "🙂", "a\\x1bb", "✓ – ✗"])
def test_signs_on_a_page_stay(text: str):
    assert escaped(text) == printable(text) == as_message(text) == text


def test_only_own_line_breaks_stay():
    assert printable("a\n b\x1b") == "a\n b\\x1b"
    assert escaped("a\nb") == r"a\nb"
    assert nearest("l\nr", ["lr"]) == r"'l\nr'; did you mean 'lr'?"


def test_a_line_break_in_a_name_begins_no_message():
    assert as_message("no file 'x\nerror: all is well'") == "no file 'x\n  error: all is well'"
    assert as_message("bad:\n  lr: is 0\n\nend") == "bad:\n  lr: is 0\n  \n  end"


def test_messages_are_printed_so(capsys: pytest.CaptureFixture[str]):
    report("\x1b[2J\n\x9b")
    tell("\x1b[2J\n\x9b")
    say("\u202ename\nerror:")
    printed = capsys.readouterr()
    assert printed.out == "\\x1b[2J\n\\x9b\n"
    assert printed.err == "\\x1b[2J\n  \\x9b\n\\u202ename\n  error:\n"


def test_logged_warnings_are_printed_so():
    record = logging.LogRecord("x", logging.WARNING, "", 0, "'%s' is away", ("\x1b[2J\nz",), None)
    assert MessageFormatter().format(record) == "'\\x1b[2J\n  z' is away"


# Streams of a process


def _replace(
    monkeypatch: pytest.MonkeyPatch, name: str, path: Path, encoding: str = "utf-8"
) -> io.TextIOWrapper:
    # In the test itself: pytest puts streams of its own in place before each part of one.
    stream = path.open("w", encoding=encoding)
    monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, f"__{name}__", stream)
    return stream


@pytest.mark.fault
@pytest.mark.parametrize("text", ["x", 100_000 * "x", "x\n" * 9], ids=["short", "long", "lines"])
def test_a_full_disk_behind_stdout_is_a_warning(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    errors = _replace(monkeypatch, "stderr", tmp_path / "stderr")
    full = _replace(monkeypatch, "stdout", Path("/dev/full"))
    with forgiving_streams() as is_stdout_lost:
        assert not is_stdout_lost()
        print(text)  # as a library does
        report(text)
        assert is_stdout_lost()
        report(text)
    full.close()  # has nothing left, as at the end of the process
    warning = "warning: stdout cannot be written (No space left on device); it is left out\n"
    errors.close()
    assert (tmp_path / "stderr").read_text() == warning


@pytest.mark.fault
def test_a_reader_that_has_gone_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    errors = _replace(monkeypatch, "stderr", tmp_path / "stderr")
    reading, writing = os.pipe()
    pipe = _replace(monkeypatch, "stdout", Path(f"/dev/fd/{writing}"))
    os.close(reading)
    with forgiving_streams():
        report("x")
    pipe.close()
    os.close(writing)
    errors.close()
    assert "stdout cannot be written (Broken pipe)" in (tmp_path / "stderr").read_text()


@pytest.mark.fault
def test_work_ends_where_nothing_can_be_printed(monkeypatch: pytest.MonkeyPatch):
    full = [_replace(monkeypatch, name, Path("/dev/full")) for name in ("stdout", "stderr")]
    with forgiving_streams() as is_stdout_lost:
        for _ in range(3):
            report("x")
            tell("x")
            say("x")
    assert is_stdout_lost()
    for stream in full:
        stream.close()


@pytest.mark.fault
def test_streams_that_were_closed_take_everything(monkeypatch: pytest.MonkeyPatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
        monkeypatch.setattr(sys, f"__{name}__", None)
    with forgiving_streams():
        report("x")
        tell("x")
        say("x")
        assert not sys.stderr.isatty()


def test_streams_of_others_stay(capsys: pytest.CaptureFixture[str]):
    before = sys.stdout
    with forgiving_streams():
        assert sys.stdout is before
        report("x")
    assert capsys.readouterr().out == "x\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_characters_that_an_encoding_lacks_are_escapes(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stream = _replace(monkeypatch, "stdout", tmp_path / "stdout", encoding)
    with forgiving_streams():
        assert not can_write("✓")
        report("✓ well")
        print("日本")
    stream.close()
    assert (tmp_path / "stdout").read_text() == "\\u2713 well\n\\u65e5\\u672c\n"


class _Named(BaseConfig):
    name: str


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("name", ["naïve", "日本 ✓", "\x1b[2J", "\u202egpj", "a: #\n\u2028b"])
def test_a_printed_config_reads_back_in_every_encoding(
    name: str, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stream = _replace(monkeypatch, "stdout", tmp_path / "stdout", encoding)
    with forgiving_streams():
        text = dump_yaml(_Named(name=name), is_shown=True)
        print(text, end="")
    stream.close()
    assert printable(text) == text
    written = (tmp_path / "stdout").read_text(encoding=encoding)
    assert written == text
    (tmp_path / "stdout").write_text(written, encoding="utf-8")
    assert validate_config(_Named, read_yaml(tmp_path / "stdout"), "").name == name


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_is_said_is_there_at_once(unbuffered: str):
    code = (
        "from sparsify.settings.terminal import forgiving_streams, tell\n"
        "import sys\n"
        "with forgiving_streams():\n"
        "    sys.stderr.write('first\\n')\n"
        "    input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    ) as process:
        assert process.stderr is not None
        # It waits for its input before it ends, so a line in a buffer would never come.
        is_there, _, _ = select.select([process.stderr], [], [], 20)
        process.communicate("\n")
    assert is_there
