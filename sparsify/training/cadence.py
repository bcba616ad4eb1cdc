"""When something is due, counted in samples."""

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
        """Whether a multiple of the period lies in (count of the last call, `n_samples`]."""
        if self.period is None:
            return False
        is_due = n_samples // self.period > self._last // self.period
        self._last = n_samples
        return is_due


@dataclass(frozen=True)
class Cadence:
    """When a run logs, evaluates and saves."""

    log: Every
    evaluate: Every
    save: Every

    @classmethod
    def from_config(cls, config: TrainingConfig, start: int = 0) -> "Cadence":
        """The cadence of a run that has seen `start` samples."""
        log_period = config.log_every_n_grad_steps * config.samples_per_step
        return cls(
            log=Every(log_period, start),
            evaluate=Every(config.eval_every_n_samples, start),
            save=Every(config.save_every_n_samples, start),
        )
