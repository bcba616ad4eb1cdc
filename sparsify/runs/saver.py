"""Checkpoints that are written while training continues, from a copy in memory."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from sparsify.runs.checkpoints import MANIFEST_NAME, save_checkpoint
from sparsify.runs.console import say
from sparsify.runs.resume import resume_line
from sparsify.runs.run_folder import METRICS_FILE
from sparsify.runs.sink import Sink
from sparsify.runs.weight_files import numbered_files
from sparsify.settings.base_config import UserError

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each new try to write the last checkpoint of a run."""


class CheckpointSaver:
    """Writes checkpoints of a run, one at a time, in a thread of its own.

    One that cannot be written, as on a full disk, does no harm to those before it: a warning says
    so, training continues, and the next is tried. Only `finish` insists.

    Args:
        run_dir: Folder of the run. None: nothing is saved.
        keep_last: How many checkpoints keep what a run needs to be resumed from them.
        sink: Is told which weights have been written, and has its log on disk before.
        metadata: What the weights belong to, kept in every weights file. None: no metadata.
        start: Samples trained on before, in a resumed run.
    """

    def __init__(
        self,
        run_dir: Path | None,
        keep_last: int,
        sink: Sink,
        metadata: Mapping[str, str] | None = None,
        start: int = 0,
    ) -> None:
        self.run_dir = run_dir
        self.keep_last = keep_last
        self.sink = sink
        self.metadata = metadata
        # Of the newest checkpoint that is written or being written.
        self.n_samples: int | None = start
        self._error: OSError | None = None
        self._bug: Exception | None = None
        self._thread: threading.Thread | None = None

    def save(self, n_samples: int, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy what is given, and write it while the caller continues.

        Waits for the checkpoint before, so that there is never more than one copy. Does nothing if
        there is one of so many samples.

        Args:
            n_samples: Samples trained on so far.
            weights: A state dict.
            state: See `save_checkpoint`.
        """
        self._wait()
        if self.run_dir is None or n_samples == self.n_samples:
            return
        self.n_samples, self._error = n_samples, None
        try:
            # The state is that of the log's end, so the log must be there before it.
            self.sink.flush()
            n_bytes = (self.run_dir / METRICS_FILE).stat().st_size
        except OSError as error:
            self._fail(error)
            return
        content = _copied(dict(weights)), _copied({**state, "metrics_bytes": n_bytes})
        # A daemon, so that a second Ctrl-C does not wait for it; half a checkpoint counts as none.
        self._thread = threading.Thread(
            target=self._write, args=(self.run_dir, n_samples, *content), daemon=True
        )
        self._thread.start()

    def finish(self, save: Callable[[], None]) -> None:
        """Have `save` call the method of that name until its checkpoint is written.

        Raises:
            UserError: It still cannot be written after half a minute.
        """
        error: OSError | None = None
        for delay in (0.0, *RETRY_DELAYS_S):
            time.sleep(delay)
            save()
            self._wait()
            if (error := self._error) is None:
                return
        assert error is not None
        assert self.run_dir is not None, "where nothing is written, nothing fails"
        is_there_another = bool(numbered_files(self.run_dir, MANIFEST_NAME))
        way_on = resume_line(self.run_dir) if is_there_another else "start a new run"
        raise UserError(
            f"save_dir: the last steps could not be saved in '{self.run_dir}' "
            f"({error.strerror}); free some space or make it writable, then {way_on}"
        )

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what is being written, unless the process is to end at once."""
        if kind is not KeyboardInterrupt:
            self._wait()

    def _write(
        self, run_dir: Path, n_samples: int, weights: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        try:
            try:
                path = save_checkpoint(
                    run_dir,
                    n_samples,
                    weights,
                    state,
                    keep_last=self.keep_last,
                    metadata=self.metadata,
                )
            except OSError as error:
                self._fail(error)
            else:
                self.sink.saved(path)
        except Exception as error:  # noqa: BLE001  (raised again where it is seen)
            self._bug = error

    def _fail(self, error: OSError) -> None:
        n_samples, self.n_samples, self._error = self.n_samples, None, error
        say(
            f"warning: save_dir: the checkpoint after {n_samples} samples cannot be written to "
            f"'{self.run_dir}' ({error.strerror}); the next save tries again"
        )

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._bug is not None:
            raise self._bug


def _copied(value: Any) -> Any:
    """A state with tensors of its own, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value
