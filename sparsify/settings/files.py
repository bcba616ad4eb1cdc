"""Opening of files that others may have made: those that are files, and of a plausible size.

In a folder from elsewhere, anything may stand under the name of a small file: a pipe, from which a
read never returns, a device that never ends, or a sparse file larger than the memory.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

MAX_TEXT_BYTES = 1_000_000
"""More than any config, manifest or result of a run has."""


def open_regular(path: Path, max_bytes: int | None = None) -> BufferedReader:
    """Open a file for reading, if it is one: no pipe, device, socket or folder.

    Args:
        path: The file, or a link to it.
        max_bytes: Size of the largest file that is opened. None: any.

    Raises:
        OSError: It cannot be opened, is no regular file, or is larger; `strerror` says which.
    """
    _check_regular(os.stat(path), path, max_bytes)
    # What stands there may have been replaced since: to open a pipe must not wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    file = os.fdopen(descriptor, "rb")
    try:
        _check_regular(os.fstat(descriptor), path, max_bytes)
    except OSError:
        file.close()
        raise
    return file


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a UTF-8 file; see `open_regular`.

    Raises:
        OSError: As `open_regular`.
        UnicodeDecodeError: It is not UTF-8.
    """
    with open_regular(path, max_bytes) as file:
        # One that grows meanwhile is not read on.
        return file.read(max_bytes).decode("utf-8")


def _check_regular(found: os.stat_result, path: Path, max_bytes: int | None) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    if max_bytes is not None and found.st_size > max_bytes:
        reason = f"it has {found.st_size:,} bytes, and at most {max_bytes:,} were expected"
        raise OSError(errno.EFBIG, reason, str(path))
