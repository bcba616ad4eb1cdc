"""Rows of JSON files: one object per line, or a single list of objects."""

import codecs
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from sparsify.data.limits import MAX_DOCUMENT
from sparsify.settings.files import open_regular

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Suffixes of compressed files that are read, and what pyarrow calls the compression."""

_HEAD_ROWS = 100
_JSON_PIECE_BYTES = 1_000_000
_UTF8_BOM = b"\xef\xbb\xbf"
_NOTHING = "nothing"


def _kind_of_value(value: object) -> str:
    if isinstance(value, str):
        return "text"
    if value in (None, []):
        return _NOTHING
    if isinstance(value, list):
        return f"lists of {type(value[0]).__name__}"
    return f"values of type {type(value).__name__}"


def json_columns(path: Path, file: BinaryIO, beside: str | None = None) -> dict[str, str]:
    """Return what each column holds in the first rows: `text`, `lists of int`, or the like.

    `nothing`: it is null or an empty list in all of them.

    Args:
        path: The file.
        file: The same, open at its beginning.
        beside: Look only at rows that have this column. None: at all.
    """
    columns: dict[str, str] = {}
    with _decompressed(path, file) as lines:
        # More than the first, which may omit what is null; and damage there shows at once.
        for row in islice(_json_rows(lines), _HEAD_ROWS):
            for name, value in row.items() if beside is None or beside in row else ():
                if columns.get(name, _NOTHING) == _NOTHING:
                    columns[name] = _kind_of_value(value)
    return columns


def read_json(path: Path, file: BinaryIO, column: str, n_skip: int) -> Iterator[Any]:
    """Iterate over the values of a column, without the first `n_skip`; one left out is None.

    Raises:
        ValueError: A row is damaged, or has its content in another column.
    """
    usual: dict[str, str] | None = None
    with _decompressed(path, file) as lines:
        for number, row in enumerate(_json_rows(lines, n_skip), n_skip + 1):
            if column not in row:
                if usual is None:
                    with open_regular(path) as again:
                        usual = json_columns(path, again, beside=column)
                _check_omitted(row, number, column, usual)
            value = row.get(column)
            if isinstance(value, str) and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError:  # which JSON can spell
                    reason = "half of a surrogate pair (\\ud8.. without \\udc..)"
                    raise ValueError(f"row {number} has {reason}") from None
            yield value


def _check_omitted(row: dict[str, Any], number: int, column: str, usual: dict[str, str]) -> None:
    """Check that a row without the column omits a null, as some writers do, and is no other row.

    Args:
        row: The row.
        number: Its number, for the message.
        column: The column that it lacks.
        usual: What the columns of the first rows that have it hold.
    """
    if column not in usual:
        raise ValueError(f"row {number} has no column '{column}'")
    kind = usual[column]
    for name, value in row.items():
        if name not in usual and kind == _kind_of_value(value) != _NOTHING:
            raise ValueError(
                f"row {number} has no column '{column}', but {kind} in '{name}'; rename that, or "
                f'add "{column}": null'
            )


@contextmanager
def _decompressed(path: Path, file: BinaryIO) -> Iterator[io.BufferedReader]:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        assert isinstance(file, io.BufferedReader), "as open_regular returns"
        yield file
        return
    with pa.CompressedInputStream(pa.PythonFile(file), compression) as stream:
        # pyarrow's class is a raw stream in all but name.
        reader: Any = stream
        yield io.BufferedReader(reader)


def _json_rows(file: io.BufferedReader, n_skip: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a file with one object per line, or with a single list of objects."""
    begin = file.peek(64)
    if begin.startswith(_UTF8_BOM):
        begin = begin.removeprefix(file.read(len(_UTF8_BOM)))
    if begin.lstrip().startswith(b"["):
        yield from _listed_rows(file, n_skip)
        return
    n_rows = 0
    for number, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT + 1), b""), 1):
        if len(line) > MAX_DOCUMENT:
            raise ValueError(f"line {number} has more than {MAX_DOCUMENT:,} bytes")
        if line.strip():
            n_rows += 1
            # A line that is skipped has been parsed before.
            if n_rows > n_skip:
                yield _parsed(line, f"line {number}")


def _parsed(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error.msg}, character {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError(f"{place} has brackets nested too deep") from error
    return _as_row(row, place)


def _as_row(row: object, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not an object {{...}}, as a row of a table is")
    return row


def _listed_rows(file: io.BufferedReader, n_skip: int) -> Iterator[dict[str, Any]]:
    """Rows of a list, of which a piece is held at a time."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    parse = json.JSONDecoder().raw_decode
    text, n_rows = decode(file.read(_JSON_PIECE_BYTES)), 0
    place = text.index("[") + 1
    while True:
        place = _behind_space(text, place)
        if n_rows == 0 and text[place : place + 1] == "]":
            _check_end(file, text[place + 1 :])
            return
        try:
            row, end = parse(text, place)
            end = _behind_space(text, end)
        except (json.JSONDecodeError, RecursionError) as error:
            row, end, fault = None, len(text), error
        else:
            fault = None
        if end == len(text):
            # The row goes on, or it is not known what follows it.
            piece = file.read(max(_JSON_PIECE_BYTES, end - place))
            if not piece or end - place > MAX_DOCUMENT:
                raise ValueError(f"row {n_rows + 1} of its list is not JSON ({fault})")
            text, place = text[place:] + decode(piece), 0
            continue
        n_rows += 1
        if text[end] not in ",]":
            raise ValueError(f"row {n_rows} of its list is not followed by a comma or a bracket")
        if n_rows > n_skip:
            yield _as_row(row, f"row {n_rows} of its list")
        if text[end] == "]":
            _check_end(file, text[end + 1 :])
            return
        place = end + 1


def _check_end(file: io.BufferedReader, rest: str) -> None:
    # Lists that were joined, as `cat` does, would lose all but the first.
    piece = rest.encode()
    while not piece.strip():
        piece = file.read(_JSON_PIECE_BYTES)
        if not piece:
            return
    raise ValueError("more follows behind the end of its list; write one list, or a row per line")


def _behind_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\n", "\r", "\t"):
        place += 1
    return place
