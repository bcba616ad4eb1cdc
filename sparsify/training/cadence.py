"""Times at which something is due, counted in samples."""

import time
from dataclasses import dataclass

from sparsify.training.config import TrainingConfig


class Every:
    """Fires when the count of samples has reached or passed another multiple of a period.

    Args:
        period: Samples between two firings. None never fires.
        start: Samples already counted. A resumed run fires where the uninterrupted one would.
    """

    def __init__(self, period: int | None, start: int = 0) -> None:
        self.period = period
        self._last = start

    def due(self, n_samples: int) -> bool:
        """Return whether a multiple of the period lies in (count of the last call, `n_samples`]."""
        if self.period is None:
            return False
        is_due = n_samples // self.period > self._last // self.period
        self._last = n_samples
        return is_due


class EverySeconds:
    """Fires when a period has passed since the last firing, or since it was made.

    Args:
        period: Seconds between two firings. None never fires.
    """

    def __init__(self, period: float | None) -> None:
        self.period = period
        self._last = time.monotonic()

    def due(self) -> bool:
        """Return whether the period has passed."""
        if self.period is None or time.monotonic() - self._last < self.period:
            return False
        self._last = time.monotonic()
        return True


@dataclass(frozen=True)
class Cadence:
    """Times at which a run logs, evaluates and saves."""

    log: Every
    evaluate: Every
    save: Every
    save_by_time: EverySeconds

    def save_due(self, n_samples: int) -> bool:
        """Return whether a checkpoint is due, for either reason."""
        by_samples, by_time = self.save.due(n_samples), self.save_by_time.due()
        return by_samples or by_time

    @classmethod
    def from_config(cls, config: TrainingConfig, start: int = 0) -> "Cadence":
        """The cadence of a run that has seen `start` samples."""
        minutes = config.save_every_minutes
        log_period = config.log_every_n_grad_steps * config.samples_per_step
        return cls(
            log=Every(log_period, start),
            evaluate=Every(config.eval_every_n_samples, start),
            save=Every(config.save_every_n_samples, start),
            save_by_time=EverySeconds(minutes and 60 * minutes),
        )
