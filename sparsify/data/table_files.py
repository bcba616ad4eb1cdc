"""Tables in local files: parquet, JSON and Arrow, read row by row in bounded memory.

A file is opened by its path alone: no name is a pattern or an address, no network is asked, and
nothing is cached.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from sparsify.data.arrow_files import arrow_batches, arrow_schema
from sparsify.data.json_files import COMPRESSIONS, json_columns, read_json
from sparsify.data.limits import MAX_DOCUMENT, check_decompressed
from sparsify.settings.files import open_regular

_BATCH_ROWS = 256
_BATCH_BYTES = 64_000_000
_MAX_EMPTY_ROWS = 1_000_000

_FORMATS = {
    **{".parquet": "parquet", ".json": "json", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"},
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), "json lines"),
}


def format_of(path: Path) -> str | None:
    """Return the format of table that a file's name says, in small or capital letters.

    It is `parquet`, `json lines`, `json`, `arrow` or `csv`, which is known, but not read. None: no
    table.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
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
    """Return the head of a table; for JSON, what the first rows say.

    Raises:
        Exception: It cannot be read, for any of the reasons that pyarrow, JSON and files have.
    """
    format_ = format_of(path)
    with open_regular(path) as file:
        if format_ == "parquet":
            parquet = pq.ParquetFile(file)
            return Head(_kinds(parquet.schema_arrow), parquet.metadata.num_rows)
        if format_ == "arrow":
            return Head(_kinds(arrow_schema(file)), None)
        return Head(json_columns(path, file), None)


def read_column(path: Path, column: str, n_skip: int) -> Generator[Any, None, None]:
    """Iterate over the values of a column, without the first `n_skip`.

    Raises:
        Exception: As `read_head`; where it is known, the message names the row.
    """
    read = {"parquet": _read_parquet, "arrow": _read_arrow}.get(format_of(path) or "", read_json)
    n_empty = 0
    with open_regular(path) as file:
        for row, value in enumerate(read(path, file, column, n_skip), n_skip + 1):
            if isinstance(value, str | list) and len(value) > MAX_DOCUMENT:
                what = "characters" if isinstance(value, str) else "token ids"
                raise ValueError(
                    f"row {row} has {len(value):,} {what}, more than {MAX_DOCUMENT:,}; cut it "
                    f"into several rows"
                )
            # Nulls without end take no space in a file.
            n_empty = 0 if value else n_empty + 1
            if n_empty > _MAX_EMPTY_ROWS:
                raise ValueError(
                    f"{n_empty:,} rows up to row {row:,} are empty, one after the other; remove "
                    f"them"
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
    check_decompressed(f"row group {index}", n_stored, n_bytes)
    # Of lists, a run of equal ids is stored as one.
    n_ids = sum(chunk.num_values for chunk in chunks) - group.num_rows
    if n_ids > MAX_DOCUMENT * group.num_rows:
        raise ValueError(f"{group.num_rows} rows of its row group {index} hold {n_ids:,} token ids")
    n_bytes = max(n_bytes, 8 * n_ids)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, n_bytes)))


def _read_arrow(path: Path, file: BinaryIO, column: str, n_skip: int) -> Iterator[Any]:
    n_before = 0
    for batch in arrow_batches(file):
        values = batch.column(column)
        # Its bytes are used as they are, and may point anywhere.
        values.validate(full=True)
        yield from _values(values, n_before, n_skip)
        n_before += len(batch)


def _values(column: pa.Array, n_before: int, n_skip: int) -> Iterator[Any]:
    # One by one: as Python objects, a batch that repeats a long text would be as large as it says.
    for row in range(max(0, n_skip - n_before), len(column)):
        try:
            yield column[row].as_py()
        except UnicodeDecodeError as error:
            raise ValueError(f"row {n_before + row + 1} is not UTF-8 ({error.reason})") from error
