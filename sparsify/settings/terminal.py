"""Texts for a terminal: names that cannot act on it, and streams that cannot end a run.

A name of a file, a column or a key may come from elsewhere and hold what a terminal obeys.
`printable` writes it as Python would in a literal; all that is printed goes through it.
"""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


DESCRIPTORS = {"stdout": 1, "stderr": 2}


def escaped(text: str) -> str:
    r"""Return `text` with each character that is no sign on a page as its escape, like `\x1b`.

    Those are controls, also of the direction of writing, line breaks, and halves of a character.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable(text: str) -> str:
    """Return `text` as `escaped`, with its line breaks."""
    return "\n".join(map(escaped, text.split("\n")))


def as_message(text: str) -> str:
    """Return `text` as `printable`, with all lines but the first one indented.

    So a line break in a name begins nothing that looks like another message.
    """
    first, *others = printable(text).split("\n")
    return "\n".join([first, *(f"  {line}" if line[:1] != " " else line for line in others)])


def report(text: str) -> None:
    """Print what came out to stdout."""
    print(printable(text), flush=True)


def tell(text: str) -> None:
    """Print a message to stderr."""
    print(as_message(text), file=sys.stderr, flush=True)


class MessageFormatter(logging.Formatter):
    """Format of a warning that a library logs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the warning as `as_message`."""
        return as_message(super().format(record))


def can_write(text: str) -> bool:
    """Return whether stdout's encoding has all characters of `text`."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def forgiving_streams() -> Iterator[Callable[[], bool]]:
    """A context in which stdout and stderr take everything, whether it can be written or not.

    A disk may be full, or the reader of a pipe gone: what matters is in files. The first failure is
    a warning on stderr. Characters that an encoding lacks are written as escapes. Streams that are
    not those of the process, as in a notebook, stay as they are.

    Yields:
        Whether something that went to stdout was lost.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    is_lost = [False]

    def warn(name: str, error: OSError) -> None:
        is_lost[0] |= name == "stdout"
        if name == "stdout":
            tell(f"warning: stdout cannot be written ({error.strerror}); it is left out")

    sys.stdout, sys.stderr = _forgiving("stdout", warn), _forgiving("stderr", warn)
    try:
        yield lambda: is_lost[0]
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _forgiving(name: str, warn: Callable[[str, OSError], None]) -> TextIO:
    stream = getattr(sys, name)
    if stream is not getattr(sys, f"__{name}__"):
        return stream
    if stream is None:  # was closed when Python started
        file = _ForgivingFile(DESCRIPTORS[name], name, warn)
        return io.TextIOWrapper(io.BufferedWriter(file), errors="backslashreplace")
    stream.reconfigure(errors="backslashreplace")
    if os.name == "nt":  # whose console is not a file
        return stream
    with suppress(OSError):
        stream.flush()
    file = _ForgivingFile(stream.fileno(), name, warn)
    return io.TextIOWrapper(
        # With PYTHONUNBUFFERED there is no buffer to flush.
        file if stream.write_through else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _ForgivingFile(io.FileIO):
    """A file whose writes succeed for whoever writes.

    Args:
        descriptor: Of the file, which stays open.
        name: What to call it.
        warn: Is told of the first failure.
    """

    def __init__(self, descriptor: int, name: str, warn: Callable[[str, OSError], None]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._stream, self._warn = name, warn
        self._has_failed = False

    def write(self, data: "ReadableBuffer", /) -> int:
        if not self._has_failed:
            try:
                return super().write(data)
            except OSError as error:
                self._has_failed = True
                self._warn(self._stream, error)
        return memoryview(data).nbytes


def _open_closed_descriptors() -> None:
    """Give closed standard descriptors to no file of a run, into which libraries would print."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
