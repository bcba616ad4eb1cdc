"""One column of a table in local files, with the interface of a table of `datasets`."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from datasets import Sequence as ListOf

from sparsify.data.table_files import read_column
from sparsify.settings.base_config import UserError


class FileRows:
    """Rows of one file; the state is how many have been given out.

    Args:
        path: The file.
        column: The column that is read.
    """

    def __init__(self, path: Path, column: str) -> None:
        self.path = path
        self.column = column
        self._n_given = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows behind those given out."""
        with closing(read_column(self.path, self.column, self._n_given)) as values:
            for value in values:
                self._n_given += 1
                yield {self.column: value}

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the last row given."""
        return {"n_rows": self._n_given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration begin where `state_dict` was called."""
        if "n_rows" not in state_dict:
            raise UserError(
                f"resume: an earlier version of sparsify has saved the place in '{self.path}'; "
                f"start a new run"
            )
        n_rows = state_dict["n_rows"]
        if type(n_rows) is not int or n_rows < 0:
            raise ValueError(f"loader.position: {n_rows!r} is not a number of rows")
        self._n_given = n_rows


@dataclass(frozen=True)
class LocalTable:
    """Files of which each is a shard.

    Attributes:
        files: The files, in order.
        column: The column that is read.
    """

    files: Sequence[Path]
    column: str

    @property
    def num_shards(self) -> int:
        """Number of files."""
        return len(self.files)

    def shard(self, num_shards: int, index: int) -> FileRows:
        """Return the rows of a file."""
        assert num_shards == self.num_shards, "files are not cut"
        return FileRows(self.files[index], self.column)


def cached(
    table: LocalTable, *, is_tokenized: bool, rows_per_shard: int, max_shards: int
) -> IterableDataset:
    """Return a table as a copy in the cache of `datasets`, cut into many shards of equal size."""
    # The cache goes by what it is given: a file that has changed is another one.
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in table.files]
    content = ListOf(Value("int64")) if is_tokenized else Value("large_string")
    rows = Dataset.from_generator(
        _rows,
        Features({table.column: content}),
        gen_kwargs={"files": files, "column": table.column},
    )
    assert isinstance(rows, Dataset), "it is not streamed"
    n_shards = min(max_shards, max(1, len(rows) // rows_per_shard))
    return rows.to_iterable_dataset(num_shards=n_shards)


def _rows(files: list[tuple[str, int, int]], column: str) -> Iterator[dict[str, Any]]:
    for path, _, _ in files:
        yield from FileRows(Path(path), column)
