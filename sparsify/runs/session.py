"""Interface of a training loop to the outside: batches, when to act, and where to report."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Generic

from sparsify.runs.bad_batch import check_loss
from sparsify.runs.saver import CheckpointSaver
from sparsify.runs.sink import Sink
from sparsify.runs.training_run import Batch, TrainingRun
from sparsify.training.batch_loss import BatchLoss
from sparsify.training.cadence import Cadence
from sparsify.training.finite import check_weights


@dataclass(frozen=True)
class Due:
    """Actions that are due after a batch."""

    log: bool
    evaluate: bool
    save: bool


class Session(Generic[Batch]):
    """A run in progress, as its loop sees it.

    Args:
        run: Settings and state of the run.
        sink: Where numbers go.
        saver: Where checkpoints go.
        is_interrupted: Says whether Ctrl-C or SIGTERM has come.
    """

    def __init__(
        self,
        run: TrainingRun[Batch],
        sink: Sink,
        saver: CheckpointSaver,
        is_interrupted: Callable[[], bool],
    ) -> None:
        self.run = run
        self.sink = sink
        self._saver = saver
        self._is_interrupted = is_interrupted
        self._cadence = Cadence.from_config(run.config, start=run.n_samples)

    def batches(self) -> Iterator[Batch]:
        """Give batches until the config's number of samples, the end of the data, or Ctrl-C."""
        config = self.run.config
        n_batches = config.n_batches - self.run.n_samples // config.batch_size
        for batch in islice(self.run.loader, n_batches):
            yield batch
            if self._is_interrupted():
                return

    def due_after(self, batch: Batch) -> Due:
        """Return what is to be done once a batch has been trained on."""
        n_samples = self.run.n_samples + self.run.n_in(batch)
        return Due(
            log=self._cadence.log.due(n_samples),
            evaluate=self._cadence.evaluate.due(n_samples),
            save=self._cadence.save_due(n_samples),
        )

    def check(self, loss: BatchLoss, batch: Batch, due: Due) -> None:
        """Raise a `UserError` if the loss of a batch is not finite, where it is looked at."""
        run = self.run
        if run.is_watched or due.log or due.save:
            tensors = run.tensors_of(batch)
            check_loss(loss, tensors, run.n_samples, run.run_dir, is_watched=run.is_watched)

    def count(self, batch: Batch) -> None:
        """Take note that a batch has been trained on."""
        self.run.n_samples += self.run.n_in(batch)
        self.sink.step(self.run.n_samples)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Report numbers, if there are any."""
        if metrics:
            self.sink.log(metrics, self.run.n_samples)

    def save(self) -> None:
        """Write a checkpoint while training continues.

        Raises:
            UserError: A weight or a gradient is not finite.
        """
        weights = self.run.trained.state_dict()
        check_weights([*weights.values(), *self.run.stepper.gradients()], self.run.n_samples)
        self._saver.save(self.run.n_samples, weights, self.run.checkpoint_state())
