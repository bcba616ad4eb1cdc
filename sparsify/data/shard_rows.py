"""The rows of one shard of a table, in spite of errors that pass."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from sparsify.data.faults import Patience, is_transient
from sparsify.settings.base_config import UserError
from sparsify.settings.secrets import one_line

State = dict[str, Any]
"""State that a shard needs to be entered again; its contents are its own business."""


class Shard(Protocol):
    """Rows that can be resumed, as those of an `IterableDataset`."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate from the first row, or, after `load_state_dict`, from there."""
        ...

    def state_dict(self) -> State:
        """Return the place behind the last row given."""
        ...

    def load_state_dict(self, state_dict: State) -> None:
        """Let the next iteration resume where `state_dict` was called."""
        ...


class ShardRows:
    """Reads a shard; after an error that may pass, resumes exactly behind the last row that came.

    Args:
        open_shard: Makes the shard, at its first row.
        state: Where to begin. None: at the first row.
        name: What to call the table in messages.
        file: The local file that holds the shard. None: it is not local, or not one file.
    """

    def __init__(
        self,
        open_shard: Callable[[], Shard],
        state: State | None,
        name: str,
        file: str | None,
    ) -> None:
        self.name = name
        self.file = file
        self._open_shard = open_shard
        self._state = state
        self._n_rows = 0  # given out since `_state`
        self._shard = open_shard()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows.

        Raises:
            UserError: The next row cannot be read, now or in a while.
        """
        patience = Patience(self.file or self.name, is_local=self.file is not None)
        while True:
            try:
                for row in self._rows_to_come():
                    self._n_rows += 1
                    patience.reset()
                    yield row
                return
            except UserError:
                raise
            # `datasets` passes on the errors of pyarrow, the file system, the network and its own;
            # all mean that the next row cannot be read.
            except Exception as error:
                if not patience.wait_out(error):
                    raise UserError(self._refusal(error, patience.so_far())) from error

    def state_dict(self) -> State:
        """Return the place behind the last row that came."""
        self._state, self._n_rows = self._shard.state_dict(), 0
        return self._state

    def _rows_to_come(self) -> Iterator[dict[str, Any]]:
        # An iteration that has raised is over, and its state may be ahead of the rows that came.
        # So the shard is opened again where a state was last asked for; later rows are skipped.
        self._shard = self._open_shard()
        if self._state is not None:
            self._shard.load_state_dict(self._state)
        rows = iter(self._shard)
        deque(islice(rows, self._n_rows), maxlen=0)
        return rows

    def _refusal(self, error: Exception, tried: str) -> str:
        reason = one_line(error)
        if self.file is None:
            what = f"dataset_name: '{self.name}' cannot be read to its end{tried}: {reason}"
            if is_transient(error, is_local=False):
                return f"{what}; check the network, then resume the run from its last checkpoint"
            return f"{what}; replace or remove the damaged file, or, for data of the hub, check it"
        table = (
            f", a file of '{self.name}'," if Path(self.name).name != Path(self.file).name else ""
        )
        what = f"dataset_name: '{self.file}'{table} cannot be read{tried}"
        if isinstance(error, FileNotFoundError):
            reason, remedy = "it is no longer there", "restore it"
        elif isinstance(error, OSError) and error.errno is not None:
            remedy = "make it readable"
        else:
            remedy = "replace the damaged file"
        return f"{what}: {reason}; {remedy}, then resume the run, or start a new run without it"
