"""Trains SAEs inside any model: the losses of a batch, and everything that learns from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.losses.total import MeanLoss, mean_losses
from sparsify.saes.base import SAE
from sparsify.training.batch_loss import BatchLoss
from sparsify.training.cadence import Every
from sparsify.training.coefficients import Coefficients
from sparsify.training.config import DeadElementsConfig, ResamplingConfig, TrainingConfig
from sparsify.training.dead_elements import DeadElements, resample
from sparsify.training.finite import check_gradient
from sparsify.training.optimizers import build_adam
from sparsify.training.recent_batches import RecentBatches
from sparsify.training.steps import build_stepper

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class SAEBatchLoss(BatchLoss):
    """Loss of a batch, and the passes that it was computed from."""

    passes: Passes
    batch: Any  # whatever the trainer's batches are

    parts: list[MeanLoss]
    """Parts of the total, which say over how many tokens or predictions they are means."""


class SAETrainer(Generic[Batch]):
    """Computes the loss of batches, and trains the SAEs that are not frozen on it.

    Args:
        saes: SAEs by position.
        forward: The passes of a batch, restricted to what counts.
        losses: Terms and coefficients.
        config: Learning rate, its schedule, and how batches make up an optimizer step.
        dead_elements: When an element counts as dead. None: nobody keeps count.
        resampling: When dead elements are made again. None: never.

    Raises:
        ValueError: All SAEs are frozen.
    """

    def __init__(
        self,
        saes: Mapping[str, SAE],
        forward: Callable[[Batch], Passes],
        losses: LossConfig,
        config: TrainingConfig,
        *,
        dead_elements: DeadElementsConfig | None = None,
        resampling: ResamplingConfig | None = None,
    ) -> None:
        self.forward = forward
        self.losses = losses
        self.config = config
        self.n_samples = 0
        """Samples trained on."""
        self.trained = {name: sae for name, sae in saes.items() if sae.is_trained}
        parameters = [p for sae in self.trained.values() for p in sae.parameters()]
        parameters = [p for p in parameters if p.requires_grad]
        if not parameters:
            raise ValueError("saes: all are frozen, so there is nothing to train")
        for sae in saes.values():
            sae.row_sparse_grads = True  # which this optimizer takes
        device = parameters[0].device
        self.is_watched = device.type == "cpu"
        """Whether every number is checked. Training would wait for a GPU at each."""
        self.coefficients = Coefficients(losses, self.trained, config.n_samples, device)
        self.recent = RecentBatches(self.trained, forward, config.batch_size)
        self.dead = dead_elements and DeadElements(dead_elements, saes)
        self.resampling = resampling
        self.resampling_due = Every(resampling and resampling.every_n_samples)
        self.stepper = build_stepper(
            parameters,
            [build_adam(parameters, config.lr)],
            config,
            constrained=list(self.trained.values()),
            before_step=self._check_gradient if self.is_watched else None,
        )

    def batch_loss(self, batch: Batch) -> SAEBatchLoss:
        """Return the loss of a batch, with the coefficients of this moment."""
        passes = self.forward(batch)
        if self.dead is not None:
            passes = self.dead.marked(passes)
        parts, terms = mean_losses(self.losses, passes, self.coefficients.factor)
        total = sum((part.mean for part in parts), torch.zeros(()))
        return SAEBatchLoss(total, terms, passes, batch, parts)

    def learn_from(self, loss: SAEBatchLoss, n_samples: int) -> None:
        """Take a batch's gradient, an optimizer step if one is due, and what no gradient teaches.

        That is: who fires; after a step also coefficients and new elements.

        Args:
            loss: From `batch_loss`.
            n_samples: Samples of the batch.
        """
        grad_norm = self.stepper.backward(loss.parts)
        self.n_samples += n_samples
        for position, sae in self.trained.items():
            sae.learn_from(loss.passes.sae_acts[position])
        self.recent.add(loss.batch)
        if self.dead is not None:
            self.dead.update(loss.passes)
        if grad_norm is None:
            return
        self.coefficients.update(loss.passes, self.n_samples)
        if self.resampling is not None and self.resampling_due.due(self.n_samples):
            self._resample(self.resampling, loss.passes)

    def fit(self) -> None:
        """Fit what SAEs use outside training, such as thresholds, to their weights.

        Before each evaluation and each save, in training mode.
        """
        self.recent.fit()

    def metrics(self, loss: SAEBatchLoss) -> dict[str, float]:
        """Numbers of a batch under the names that are logged; terms without their coefficients."""
        metrics = {"loss": loss.total.item()}
        metrics |= {f"loss/train/{name}": value.item() for name, value in loss.terms.items()}
        acts_by_position = loss.passes.sae_acts if loss.parts else {}  # no token was kept
        for position, acts in acts_by_position.items():
            l0 = (acts.c != 0).sum(dim=-1).float().mean()
            metrics[f"sparsity/train/L_0/{position}"] = l0.item()
        metrics |= {"grad_norm": self.stepper.grad_norm.item(), "lr": self.stepper.lr}
        metrics |= self.coefficients.metrics()
        return metrics if self.dead is None else metrics | self.dead.metrics()

    def state_dict(self) -> dict[str, Any]:  # of several types
        """State that the next steps depend on, except the SAEs' weights and the stepper's."""
        return {
            "coefficients": self.coefficients.state_dict(),
            "dead": self.dead and self.dead.state_dict(),
            "recent": self.recent.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], n_samples: int) -> None:
        """Continue from what `state_dict` returned after `n_samples`."""
        self.n_samples = n_samples
        self.coefficients.load_state_dict(state["coefficients"])
        if self.dead is not None:
            self.dead.load_state_dict(state["dead"])
        self.recent.load_state_dict(state["recent"])
        # It is asked after optimizer steps alone, and the checkpoint may lie between two.
        n_stepped = n_samples - n_samples % self.config.samples_per_step
        self.resampling_due = Every(self.resampling_due.period, n_stepped)

    def _resample(self, config: ResamplingConfig, passes: Passes) -> None:
        if self.n_samples > config.until_n_samples or self.dead is None or passes.n_tokens == 0:
            return
        for position, sae in self.trained.items():
            dead, acts = self.dead.dead(position), passes.sae_acts[position]
            self.dead.forget(position, resample(sae, acts, dead, self.stepper.optimizers[0]))

    def _check_gradient(self, grad_norm: Tensor) -> None:
        check_gradient(grad_norm, self.n_samples)
