"""Tables in local files: parquet, JSON and Arrow, read row by row in bounded memory.

A file is opened by its path alone: no name is a pattern or an address, no network is asked, and
nothing is cached.
"""

import codecs
import io
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from sparsify.settings.files import open_regular

MAX_DOCUMENT = 64_000_000
"""Characters, token ids or bytes of JSON in one row; a longer row is refused."""

_HEAD_ROWS = 100
_BATCH_ROWS = 256
_BATCH_BYTES = 64_000_000
_BOMB_BYTES = 256_000_000
_BOMB_RATIO = 100
_JSON_PIECE_BYTES = 1_000_000
_UTF8_BOM = b"\xef\xbb\xbf"
_ARROW_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")

_FORMATS = {
    **{".parquet": "parquet", ".jsonl": "json lines", ".ndjson": "json lines", ".json": "json"},
    **{".arrow": "arrow", ".csv": "csv", ".tsv": "csv"},
}
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def format_of(path: Path) -> str | None:
    """Return the format of table that a file's name says, in small or capital letters.

    It is `parquet`, `json lines`, `json`, `arrow` or `csv`, which is known, but not read. None: no
    table.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        inner = _FORMATS.get(suffixes[0]) if len(suffixes) == 2 else None
        # What is compressed and named .json is no metadata of something else.
        return {"json": "json lines", "json lines": "json lines", "csv": "csv"}.get(inner or "")
    return _FORMATS.get(suffixes[-1]) if suffixes else None


@dataclass(frozen=True)
class Head:
    """What a table says before its rows are read.

    Attributes:
        columns: What each column holds: `text`, `lists of int64`, or the like; `nothing` if that is
            not known yet.
        n_rows: None: it is not known without reading them.
    """

    columns: dict[str, str]
    n_rows: int | None


def read_head(path: Path) -> Head:
    """Return the head of a table; for JSON this is its first row, and the next ones are looked at.

    Raises:
        Exception: It cannot be read, for any of the reasons that pyarrow, JSON and files have.
    """
    format_ = format_of(path)
    with open_regular(path) as file:
        if format_ == "parquet":
            parquet = pq.ParquetFile(file)
            return Head(_kinds(parquet.schema_arrow), parquet.metadata.num_rows)
        if format_ == "arrow":
            _check_end(file)
            return Head(_kinds(_open_arrow(file)[0]), None)
        with _decompressed(path, file) as lines:
            # More than the first, so that damage near the beginning shows at once.
            row = next(iter(list(islice(_json_rows(lines), _HEAD_ROWS))), {})
            return Head({name: _kind_of_value(value) for name, value in row.items()}, None)


def read_column(path: Path, column: str, n_skip: int) -> Generator[Any, None, None]:
    """Iterate over the values of a column, without the first `n_skip`.

    Raises:
        Exception: As `read_head`; where it is known, the message names the row.
    """
    read = {"parquet": _read_parquet, "arrow": _read_arrow}.get(format_of(path) or "", _read_json)
    with open_regular(path) as file:
        for row, value in enumerate(read(path, file, column, n_skip), n_skip + 1):
            if isinstance(value, str | list) and len(value) > MAX_DOCUMENT:
                what = "characters" if isinstance(value, str) else "token ids"
                raise ValueError(
                    f"row {row} has {len(value):,} {what}, more than {MAX_DOCUMENT:,}; cut it "
                    f"into several rows"
                )
            yield value


# Parquet and Arrow


def _kinds(schema: pa.Schema) -> dict[str, str]:
    return {field.name: _kind(field.type) for field in schema}


def _kind(type_: pa.DataType) -> str:
    if pa.types.is_dictionary(type_):
        return _kind(type_.value_type)
    if pa.types.is_null(type_):
        return "nothing"
    if pa.types.is_string(type_) or pa.types.is_large_string(type_) or str(type_) == "string_view":
        return "text"
    if (
        pa.types.is_list(type_)
        or pa.types.is_large_list(type_)
        or pa.types.is_fixed_size_list(type_)
    ):
        return f"lists of {type_.value_type}"
    return f"values of type {type_}"


def _read_parquet(path: Path, file: BinaryIO, column: str, n_skip: int) -> Iterator[Any]:
    parquet = pq.ParquetFile(file)
    n_before = 0
    for index in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(index)
        if n_before + group.num_rows <= n_skip:
            n_before += group.num_rows
            continue
        n_rows = _rows_at_once(group, column, index)
        batches = parquet.iter_batches(
            n_rows, row_groups=[index], columns=[column], use_threads=False
        )
        for batch in batches:
            yield from _values(batch.column(column), n_before, n_skip)
            n_before += len(batch)


def _rows_at_once(group: pq.RowGroupMetaData, column: str, index: int) -> int:
    """Rows that decode to a bounded size, also if all repeat one long value of a dictionary."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}.")]
    n_bytes = sum(chunk.total_uncompressed_size for chunk in chunks)
    n_stored = sum(chunk.total_compressed_size for chunk in chunks)
    if n_bytes > _BOMB_BYTES and n_bytes > _BOMB_RATIO * n_stored:
        raise ValueError(
            f"{n_stored:,} bytes of its row group {index} would become {n_bytes:,} in memory"
        )
    # Of lists, a run of equal ids is stored as one.
    n_ids = sum(chunk.num_values for chunk in chunks) - group.num_rows
    if n_ids > MAX_DOCUMENT * group.num_rows:
        raise ValueError(f"{group.num_rows} rows of its row group {index} hold {n_ids:,} token ids")
    n_bytes = max(n_bytes, 8 * n_ids)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, n_bytes)))


def _read_arrow(path: Path, file: BinaryIO, column: str, n_skip: int) -> Iterator[Any]:
    _check_end(file)
    n_before = 0
    for batch in _open_arrow(file)[1]:
        values = batch.column(column)
        # Its bytes are used as they are, and may point anywhere.
        values.validate(full=True)
        yield from _values(values, n_before, n_skip)
        n_before += len(batch)


def _open_arrow(file: BinaryIO) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and batches of a stream, as `save_to_disk` writes it, or of a file of Arrow."""
    file.seek(0)
    try:
        stream = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        whole = pa.ipc.open_file(file)
        return whole.schema, map(whole.get_batch, range(whole.num_record_batches))
    return stream.schema, iter(stream)


def _check_end(file: BinaryIO) -> None:
    # A stream that was cut between two batches is read without an error.
    file.seek(-min(8, file.seek(0, io.SEEK_END)), io.SEEK_END)
    if not file.read().endswith(_ARROW_ENDS):
        raise ValueError("it is cut off, or not Arrow")


def _values(column: pa.Array, n_before: int, n_skip: int) -> Iterator[Any]:
    # One by one: as Python objects, a batch that repeats a long text would be as large as it says.
    for row in range(max(0, n_skip - n_before), len(column)):
        try:
            yield column[row].as_py()
        except UnicodeDecodeError as error:
            raise ValueError(f"row {n_before + row + 1} is not UTF-8 ({error.reason})") from error


# JSON


def _kind_of_value(value: object) -> str:
    if isinstance(value, str):
        return "text"
    if value in (None, []):
        return "nothing"
    if isinstance(value, list):
        return f"lists of {type(value[0]).__name__}"
    return f"values of type {type(value).__name__}"


def _read_json(path: Path, file: BinaryIO, column: str, n_skip: int) -> Iterator[Any]:
    with _decompressed(path, file) as lines:
        for number, row in enumerate(_json_rows(lines, n_skip), n_skip + 1):
            value = row.get(column)
            if isinstance(value, str) and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError:  # which JSON can spell
                    reason = "half of a surrogate pair (\\ud8.. without \\udc..)"
                    raise ValueError(f"row {number} has {reason}") from None
            yield value


@contextmanager
def _decompressed(path: Path, file: BinaryIO) -> Iterator[io.BufferedReader]:
    compression = _COMPRESSIONS.get(path.suffix.lower())
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
    text, place, n_rows = decode(file.read(_JSON_PIECE_BYTES)), 0, 0
    place = text.index("[") + 1
    while True:
        place = _behind_space(text, place)
        if n_rows == 0 and text[place : place + 1] == "]":
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
            return
        place = end + 1


def _behind_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\n", "\r", "\t"):
        place += 1
    return place
