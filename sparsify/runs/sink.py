"""The interface that a run reports to."""

from collections.abc import Mapping
from pathlib import Path


class Sink:
    """Takes events of a run and does nothing. Other sinks override what concerns them."""

    def step(self, n_samples: int) -> None:
        """Take note that `n_samples` training samples are done. Called after each batch."""

    def log(self, metrics: Mapping[str, float], n_samples: int) -> None:
        """Take numbers measured after `n_samples` training samples."""

    def console(self, text: str) -> None:
        """Take a text for whoever watches."""

    def flush(self) -> None:
        """Put on disk what was logged. Raises an `OSError` if that fails."""

    def saved(self, path: Path) -> None:
        """Take note that weights have been written. Called in another thread than the rest."""

    def close(self, *, has_failed: bool = False) -> None:
        """Finish. Nothing is reported afterwards."""
