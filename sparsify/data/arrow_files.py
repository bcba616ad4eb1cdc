"""Batches of an Arrow file, of which none becomes much larger in memory than it is."""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa

from sparsify.data.limits import check_decompressed

_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_MAX_PADDING = 64
# The compression of files from before Arrow 1.0, which its format does not describe.
_OLD_COMPRESSION = b"ARROW:experimental_compression"


def arrow_schema(file: BinaryIO) -> pa.Schema:
    """Return the schema of an Arrow file.

    Raises:
        ValueError: It is cut off, or not Arrow.
    """
    return _open(file)[0].schema


def arrow_batches(file: BinaryIO) -> Iterator[pa.RecordBatch]:
    """Iterate over the batches of a stream, as `save_to_disk` writes it, or of a file of Arrow.

    Raises:
        ValueError: It is cut off, fills the memory with little data, or goes on behind its end.
    """
    stream, end = _open(file)
    dictionaries = _Size()
    while True:
        place = file.tell()
        if not _check_next_batch(file, dictionaries):
            break
        file.seek(place)
        yield stream.read_next_batch()
    if not 0 <= end - file.tell() < _MAX_PADDING:
        raise ValueError("more follows behind the end of its rows; files cannot be joined to one")


def _open(file: BinaryIO) -> tuple[pa.RecordBatchStreamReader, int]:
    """Rows as a stream, and where it must end."""
    size = file.seek(0, io.SEEK_END)
    file.seek(-min(10, size), io.SEEK_END)
    tail = file.read()
    file.seek(0)
    # A file of Arrow is a stream with a table of contents, which could lead anywhere.
    is_file = file.read(len(_MAGIC)) == _MAGIC
    # A stream that was cut between two batches is read without an error.
    if len(tail) < 10 or not tail.endswith(_MAGIC if is_file else _STREAM_END):
        raise ValueError("it is cut off, or not Arrow")
    file.seek(8 if is_file else 0)
    end = size - 10 - int.from_bytes(tail[:4], "little") if is_file else size
    return pa.ipc.open_stream(file), end


@dataclass
class _Size:
    """Bytes of parts of a file, as they are stored and in memory."""

    n_stored: int = 0
    n_bytes: int = 0


def _check_next_batch(file: BinaryIO, dictionaries: _Size) -> bool:
    """Check the size of the next batch, with all dictionaries so far. False: there is none."""
    while True:
        try:
            message = pa.ipc.read_message(file)
        except EOFError:
            return False
        size = _size(message)
        size.n_stored += dictionaries.n_stored
        size.n_bytes += dictionaries.n_bytes
        check_decompressed("batches", size.n_stored, size.n_bytes)
        if message.type != "dictionary":
            return True
        dictionaries.n_stored, dictionaries.n_bytes = size.n_stored, size.n_bytes


def _size(message: pa.ipc.Message) -> _Size:
    """Size of a batch or a dictionary, by the numbers that stand before its compressed buffers.

    pyarrow does not give them, so this reads the tables `Message`, `DictionaryBatch` and
    `RecordBatch` of Message.fbs in the format of Arrow.
    """
    data, body = message.metadata.to_pybytes(), message.body
    if _OLD_COMPRESSION in data:
        raise ValueError("it is compressed as before Arrow 1.0; write it again")
    batch = _follow(data, _field(data, _follow(data, 0), 2))
    if message.type == "dictionary":
        batch = _follow(data, _field(data, batch, 1))
    size = _Size(body.size, body.size)
    buffers, compression = _field(data, batch, 2), _field(data, batch, 3)
    if not buffers or not compression:
        return size
    begin = _follow(data, buffers)
    [n_buffers] = struct.unpack_from("<I", data, begin)
    for index in range(n_buffers):
        offset, n_stored = struct.unpack_from("<qq", data, begin + 4 + 16 * index)
        if n_stored:
            # -1: it is stored as it is.
            size.n_bytes += max(0, *struct.unpack_from("<q", body, offset))
    return size


def _follow(data: bytes, place: int) -> int:
    return place + int(struct.unpack_from("<I", data, place)[0])


def _field(data: bytes, table: int, index: int) -> int:
    """Place of a field of a table of FlatBuffers. 0: it has none."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    size, slot = struct.unpack_from("<H", data, fields)[0], 4 + 2 * index
    offset = struct.unpack_from("<H", data, fields + slot)[0] if slot < size else 0
    return table + offset if offset else 0
