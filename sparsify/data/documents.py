"""Streams of documents that can stop anywhere and be resumed there.

A stream gives its documents in chunks. With each chunk comes the position behind it, in plain data
that a checkpoint can hold; the stream can be entered again at any such position. What is held in
memory is one chunk.
"""

import codecs
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparsify.data.faults import retried
from sparsify.data.shard_rows import Shard, ShardRows
from sparsify.settings.base_config import UserError
from sparsify.settings.files import open_regular

Position = list[Any]
"""Place in a stream; what it holds is the stream's own business, but it is always plain data."""

CHUNK_DOCUMENTS = 256
CHUNK_CHARS = 250_000


@dataclass(frozen=True)
class Chunk:
    """Some documents in a row.

    Attributes:
        documents: All texts, or all lists of token ids.
        next: Position behind them.
        is_cut: The last document continues in the next chunk.
    """

    documents: list[str] | list[list[int]]
    next: Position
    is_cut: bool = False


class Documents(Protocol):
    """Documents in an order that a random generator decides."""

    def chunks(self, rng: np.random.Generator, position: Position | None) -> Iterator[Chunk]:
        """Iterate over the documents from `position` on. None is the start.

        A position is valid only with a generator in the state that it had when the position was
        made.
        """
        ...


@dataclass(frozen=True)
class TextFiles:
    """Files whose text is one document each; long ones are read in pieces.

    Attributes:
        paths: The files.
        skip_binary: Leave out files that are not UTF-8, instead of refusing them. A long file may
            turn out not to be after some pieces have been read; then its rest is left out.
        found: What was taken for the documents, for the log.
    """

    paths: Sequence[Path]
    skip_binary: bool
    found: str = ""

    def chunks(self, rng: np.random.Generator, position: Position | None) -> Iterator[Chunk]:
        """See `Documents`. A position is the number of files done and bytes of the next one."""
        order = rng.permutation(len(self.paths))
        n_done, offset = position or (0, 0)
        texts: list[str] = []
        while n_done < len(order):
            continues = offset > 0
            text, offset = self._read(self.paths[order[n_done]], offset)
            n_done += offset == 0
            # A document that was cut needs an end, even if nothing of it is left.
            texts += [text] if text or continues else []
            if offset or len(texts) == CHUNK_DOCUMENTS or sum(map(len, texts)) >= CHUNK_CHARS:
                yield Chunk(texts, [n_done, offset], is_cut=offset > 0)
                texts = []
        if texts:
            yield Chunk(texts, [n_done, 0])

    def check(self) -> None:
        """Read the beginning of each file.

        Raises:
            UserError: One cannot be read.
        """
        for path in self.paths:
            self._read(path, 0)

    def is_small(self) -> bool:
        """Return True if all files together fit into one chunk."""
        return (
            len(self.paths) <= CHUNK_DOCUMENTS
            and sum(path.stat().st_size for path in self.paths) <= CHUNK_CHARS
        )

    def _read(self, path: Path, offset: int) -> tuple[str, int]:
        try:
            text, end = retried(lambda: read_piece(path, offset), str(path))
            # What a sparse file, or one that was lost in a crash, is full of.
            if text and not text.strip("\0"):
                raise ValueError("holds nothing but zero bytes")
            return text, end
        except ValueError as error:
            if self.skip_binary:
                return "", 0
            is_text = not isinstance(error, UnicodeDecodeError)
            reason = error if is_text else "is not UTF-8 text"
            raise UserError(f"dataset_name: '{path}' {reason}; convert or remove it") from None
        except EOFError:
            raise UserError(
                f"dataset_name: '{path}' has become shorter than the {offset} bytes already read "
                f"of it; restore it, then resume the run, or start a new run with it as it is"
            ) from None
        except OSError as error:
            raise UserError(
                f"dataset_name: '{path}' cannot be read ({error.strerror or error}); "
                f"restore it, make it readable, or start a new run without it"
            ) from None


def read_piece(path: Path, offset: int, max_bytes: int = CHUNK_CHARS) -> tuple[str, int]:
    """Text from byte `offset` of a UTF-8 file, and the offset behind it (0: the file is done).

    A piece that is not the last ends with a line, or, in a longer line, between two characters.

    Raises:
        UnicodeDecodeError: The piece is not UTF-8.
        EOFError: The file ends before `offset`, which was not its end when the last piece was read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if offset and offset >= size:
            raise EOFError(f"{path} has {size} bytes, and byte {offset} was asked for")
        file.seek(offset)
        data = file.read(max_bytes)
    if offset + len(data) >= size:
        return data.decode("utf-8"), 0
    end = data.rfind(b"\n") + 1 or len(data)
    decoder = codecs.getincrementaldecoder("utf-8")()
    text = decoder.decode(data[:end])
    begun_character, _ = decoder.getstate()
    return text, offset + end - len(begun_character)


class Table(Protocol):
    """Rows in shards, as `datasets` has them."""

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        ...

    def shard(self, num_shards: int, index: int) -> Shard:
        """Return the rows of a shard."""
        ...


@dataclass(frozen=True)
class TableRows:
    """One column of a table. Its shards are put in order, the rows of one stay in order.

    Attributes:
        dataset: The table.
        column: Its column of texts or of lists of token ids.
        is_tokenized: Which of the two.
        name: What to call the table in messages.
        files: The local file of each shard. Empty: the table is not local, or not read from them.
        found: What was taken for the documents, for the log.
    """

    dataset: Table
    column: str
    is_tokenized: bool
    name: str
    files: Sequence[str] = ()
    found: str = ""

    def chunks(self, rng: np.random.Generator, position: Position | None) -> Iterator[Chunk]:
        """See `Documents`. A position is the number of shards done and the state of the next."""
        n_shards = self.dataset.num_shards
        order = rng.permutation(n_shards)
        n_done, state = position or (0, None)
        for index in range(n_done, n_shards):
            shard = int(order[index])
            rows = self._rows(shard, state)
            state = None
            documents: list[Any] = []  # str or list[int], as `is_tokenized` says
            for row in rows:
                documents += self.contents(row, self._file(shard))
                if len(documents) == CHUNK_DOCUMENTS or _n_items(documents) >= CHUNK_CHARS:
                    yield Chunk(documents, [index, rows.state_dict()])
                    documents = []
            if documents:
                yield Chunk(documents, [index + 1, None])

    def first_row(self) -> dict[str, Any] | None:
        """Return the first row. None: there is none."""
        for shard in range(self.dataset.num_shards):
            for row in self._rows(shard, None):
                return row
        return None

    def _rows(self, shard: int, state: dict[str, Any] | None) -> ShardRows:
        n_shards = self.dataset.num_shards
        open_shard = partial(self.dataset.shard, num_shards=n_shards, index=shard)
        return ShardRows(open_shard, state, self.name, self._file(shard))

    def _file(self, shard: int) -> str | None:
        return self.files[shard] if len(self.files) == self.dataset.num_shards else None

    def contents(self, row: dict[str, Any], file: str | None = None) -> list[str] | list[list[int]]:
        """Return the document of a row, or nothing if it is empty.

        Args:
            row: The row.
            file: The file that it is from, for messages. None: it is not local.

        Raises:
            UserError: The row does not hold what `is_tokenized` says.
        """
        value = row[self.column]
        if value in (None, "", []):
            return []
        if not self.is_tokenized and isinstance(value, str):
            return [value]
        if self.is_tokenized and isinstance(value, list) and all(type(i) is int for i in value):
            return [value]
        name = self.name if file is None or len(self.files) == 1 else file
        found = "text" if isinstance(value, str) else _describe(value)
        raise UserError(wrong_kind(self.column, name, found, is_tokenized=self.is_tokenized))


def wrong_kind(column: str, name: str, found: str, *, is_tokenized: bool) -> str:
    """Return the message on a column that does not hold what `is_tokenized` says."""
    wanted = "lists of token ids" if is_tokenized else "text"
    remedies = ["set column_name to another column"]
    if found.startswith(("text", "lists of int", "lists of uint")):  # which the other value suits
        remedies.insert(0, f"set is_tokenized: {'false' if is_tokenized else 'true'}")
    return (
        f"is_tokenized: column '{column}' of '{name}' holds {found}, not {wanted}; "
        f"{', or '.join(remedies)}"
    )


def _n_items(documents: Sequence[str | list[int]]) -> int:
    return sum(map(len, documents))


def _describe(value: object) -> str:
    if isinstance(value, list):
        return f"lists of {type(value[0]).__name__}"
    return f"values of type {type(value).__name__}"
