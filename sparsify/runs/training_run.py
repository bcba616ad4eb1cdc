"""Interface of a kind of training run, by which the library starts, checks, saves and resumes it.

A script folder subclasses `TrainingRun` with what it trains, and keeps the loop in its `train`. All
else of a run's life is in `lifecycle.py`; what the loop needs of it is a `Session`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from sparsify.data.batches import Loader
from sparsify.runs.checkpoints import Checkpoint
from sparsify.training.batch_loss import BatchLoss
from sparsify.training.config import TrainingConfig
from sparsify.training.finite import check_weights
from sparsify.training.random_state import get_random_state, set_random_state
from sparsify.training.state_check import MisfitError, check_like
from sparsify.training.steps import GradientStepper

if TYPE_CHECKING:  # a session holds the run, and the run's loop is handed the session
    from sparsify.runs.session import Session

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class OpeningStep:
    """Something that a run opens before it trains, or checks in a dry run.

    Attributes:
        name: What is opened: a setting, or a part of the run.
        run: Opens it and returns what was found, in a line. Raises a `UserError` that says what to
            change.
        needs: Names of the steps on whose success it builds.
    """

    name: str
    run: Callable[[], str]
    needs: tuple[str, ...] = ()


class TrainingRun(ABC, Generic[Batch]):
    """A run of one kind: its settings, what it trains, and how far it is.

    Args:
        config: Settings.
        is_trial: Whether nothing will be trained: a dry run may open less, and counts the data.
    """

    kept_settings: ClassVar[tuple[str, ...]]
    """Names of settings that a resumed run must have as they were."""

    memory_remedies: ClassVar[str] = "batch_size (keep effective_batch_size)"
    """Settings to lower when memory runs out."""

    subject: ClassVar[str] = "the model was"
    """Subject of "... trained on so many samples", with its verb."""

    item: ClassVar[str] = "tokens"
    """Name of the items that a sample consists of."""

    weights_step: ClassVar[str]
    """Name of the opening step that makes `trained`."""

    stepper: GradientStepper
    loader: Loader[Batch]

    def __init__(self, config: TrainingConfig, *, is_trial: bool = False) -> None:
        self.config = config
        self.is_trial = is_trial
        self.run_dir: Path | None = None
        """Folder of the run. None: it writes no files, or has not made it yet."""
        self.n_samples = 0
        """Samples trained on."""

    @abstractmethod
    def opening_steps(self) -> list[OpeningStep]:
        """Return the steps that open all that the config names, in their order.

        They set `loader`. `run_dir` is known to them in a resumed run alone.
        """

    @abstractmethod
    def build(self) -> None:
        """Make what trains, `stepper` among it, from what has been opened."""

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The module whose weights are the result."""

    @property
    def items_per_sample(self) -> int:
        """Items, such as tokens, in a sample."""
        return 1

    @property
    def is_watched(self) -> bool:
        """Return whether every loss is checked. Training would wait for a GPU at each."""
        return True

    def identity(self) -> dict[str, str]:
        """Return what every weights file records of what the weights belong to."""
        return {}

    def on_folder(self, run_dir: Path) -> None:
        """Write into a new folder what a resumed run will open from there."""

    @abstractmethod
    def tensors_of(self, batch: Batch) -> dict[str, Tensor]:
        """Return the tensors of a batch by name, each with a row for each sample."""

    @abstractmethod
    def batch_loss(self, batch: Batch) -> BatchLoss:
        """Return the loss of a batch."""

    def learn_from(self, loss: Any, batch: Batch) -> None:  # what `batch_loss` returned
        """Take the gradient of a batch's loss, and an optimizer step if one is due."""
        self.stepper.backward(loss.total)

    @abstractmethod
    def train(self, session: "Session[Batch]") -> None:
        """Train on the batches of a session: the loop."""

    @abstractmethod
    def finish(self, session: "Session[Batch]") -> str:
        """Evaluate what was trained, write the result, and return what to say of it at the end."""

    def state_dict(self) -> dict[str, Any]:  # of several types
        """Return the state of this kind of run, except weights, stepper, loader and generators."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned after `n_samples`."""

    def checkpoint_state(self) -> dict[str, Any]:  # of several types
        """Return everything that the rest of the run depends on, except the weights."""
        return {
            **self.state_dict(),
            "stepper": self.stepper.state_dict(),
            "loader": self.loader.state_dict(),
            "random": get_random_state(),
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the run.

        Raises:
            MisfitError: Its state is not one that this run can have after so many samples.
        """
        state, n_samples = checkpoint.state, checkpoint.n_samples
        check_like(state, {**self.state_dict(), "stepper": {}, "loader": {}, "random": {}}, "state")
        n_batches, n_more = divmod(n_samples, self.config.batch_size)
        n_steps, n_in_step = divmod(n_batches, self.config.n_accumulation_steps)
        expected = {"n_steps": n_steps, "n_batches_in_step": n_in_step}
        found = {name: state["stepper"].get(name) for name in expected}
        if n_more or found != expected:
            raise MisfitError(f"stepper has {found}, which do not belong to {n_samples} samples")
        check_weights(checkpoint.weights.values(), n_samples)
        self.n_samples = n_samples
        self.trained.load_state_dict(checkpoint.weights)
        self.stepper.load_state_dict(state["stepper"])
        self.loader.load_state_dict(state["loader"])
        self.load_state_dict(state)
        set_random_state(state["random"])

    def n_in(self, batch: Batch) -> int:
        """Return the number of samples in a batch."""
        return len(next(iter(self.tensors_of(batch).values())))
