"""Optimizer steps: gradients of several batches averaged over their items, clipped and applied."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sparsify.losses.total import MeanLoss
from sparsify.training.accumulation import GradientMean, add_gradients
from sparsify.training.config import TrainingConfig
from sparsify.training.schedules import build_lr_schedulers


class Constrained(Protocol):
    """Has parameters that are held to constraints."""

    def project_gradients(self) -> None:
        """Take out of the gradients what would break them."""

    def restore_constraints(self) -> None:
        """Have the parameters satisfy them."""


def build_stepper(
    parameters: Iterable[nn.Parameter],
    optimizers: Sequence[Optimizer],
    config: TrainingConfig,
    *,
    constrained: Sequence[Constrained] = (),
    before_step: Callable[[Tensor], None] | None = None,
) -> "GradientStepper":
    """Return a stepper that keeps all settings of a run that it can: schedule, batches, clipping.

    Args:
        parameters: Parameters that the optimizers move.
        optimizers: Optimizers at the learning rate that the schedule starts from.
        config: Settings of the run.
        constrained: See `GradientStepper`.
        before_step: See `GradientStepper`.
    """
    return GradientStepper(
        parameters,
        optimizers,
        build_lr_schedulers(optimizers, config),
        n_accumulation_steps=config.n_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        constrained=constrained,
        before_step=before_step,
    )


class GradientStepper:
    """Turns the losses of batches into optimizer steps.

    For a loss that is a plain mean over items, `n_accumulation_steps` batches give the step of one
    batch with all their items. Gradients may be sparse COO tensors of whole rows.

    Args:
        parameters: What the optimizers move. Their gradients are clipped together.
        optimizers: Stepped together.
        schedulers: Stepped after the optimizers.
        n_accumulation_steps: Batches in one step.
        max_grad_norm: Gradients of a larger total norm are scaled down to it. None never clips.
        constrained: Modules that are held to constraints: what would break them is taken out of the
            gradients, and after each step they hold again.
        before_step: Called with the gradient's norm before each optimizer step, which it can
            prevent by raising.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[LambdaLR],
        *,
        n_accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        constrained: Sequence[Constrained] = (),
        before_step: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.n_accumulation_steps = n_accumulation_steps
        self.max_grad_norm = max_grad_norm
        self.constrained = constrained
        self.before_step = before_step
        self.n_steps = 0
        self.grad_norm = torch.zeros(())
        """Norm of the last step's gradient, before clipping."""
        self._n_batches_in_step = 0
        self._means = [GradientMean(self.parameters)]
        """Gradients of the step so far, one for each part of the loss."""

    @property
    def lr(self) -> float:
        """Learning rate of the next step of the first optimizer."""
        return self.optimizers[0].param_groups[0]["lr"]

    def backward(self, loss: Float[Tensor, ""] | Sequence[MeanLoss]) -> Float[Tensor, ""] | None:
        """Add the gradient of one batch's loss, and step if the effective batch is full.

        Args:
            loss: Mean over the items of the batch, of which all batches have as many. Or parts that
                are added, each a mean over a number of items, and in the same order for each batch.

        Returns:
            Norm of the averaged gradient before clipping if a step was taken. None otherwise.
        """
        self._accumulate([MeanLoss(loss, 1)] if isinstance(loss, Tensor) else loss)
        self._n_batches_in_step += 1
        if self._n_batches_in_step < self.n_accumulation_steps:
            return None
        taken = add_gradients([mean.take(self.n_accumulation_steps) for mean in self._means])
        self._means = [GradientMean(self.parameters)]
        for parameter, gradient in zip(self.parameters, taken, strict=True):
            parameter.grad = gradient
        for module in self.constrained:
            module.project_gradients()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        values = [grad.values() if grad.is_sparse else grad for grad in grads]
        grad_norm = get_total_norm(values)
        if self.before_step is not None:
            self.before_step(grad_norm)
        self._n_batches_in_step = 0
        self.n_steps += 1
        if self.max_grad_norm is not None:
            # As `torch.nn.utils.clip_grad_norm_`, without which a row-sparse gradient would forget
            # that its rows are in order.
            scale = (self.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
            for value in values:
                value.mul_(scale)
        for stepped in (*self.optimizers, *self.schedulers):
            stepped.step()
        for module in self.constrained:
            module.restore_constraints()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.grad_norm = grad_norm
        return grad_norm

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the batches of a step that is not full yet."""
        return [grad for mean in self._means for grad in mean.gradients if grad is not None]

    def _accumulate(self, parts: Sequence[MeanLoss]) -> None:
        if self.n_accumulation_steps == 1 and len(parts) > 1:  # each is the mean over the step
            parts = [MeanLoss(sum((part.mean for part in parts), torch.zeros(())), 1)]
        while len(self._means) < len(parts):
            self._means.append(GradientMean(self.parameters))
        for index, (mean, part) in enumerate(zip(self._means, parts, strict=False)):
            is_last = index == len(parts) - 1
            mean.add(part, self.n_accumulation_steps, retain_graph=not is_last)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next steps depend on, except the parameters, in plain data."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "gradients": [gradient for mean in self._means for gradient in mean.gradients],
            "n_items": [(mean.n_first, mean.n_items) for mean in self._means],
            "n_batches_in_step": self._n_batches_in_step,
            "n_steps": self.n_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for optimizer, content in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        for scheduler, content in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(content)
            # Otherwise the next step would be by the schedule of the run that was saved.
            for index, group in enumerate(scheduler.optimizer.param_groups):
                factor = scheduler.lr_lambdas[index](scheduler.last_epoch)
                group["lr"] = scheduler.base_lrs[index] * factor
        gradients = iter(state["gradients"])
        self._means = [GradientMean(self.parameters) for _ in state["n_items"]]
        for mean, counts in zip(self._means, state["n_items"], strict=True):
            mean.n_first, mean.n_items = counts
            mean.gradients = [
                None if gradient is None else gradient.to(parameter)
                for parameter, gradient in zip(self.parameters, gradients, strict=False)
            ]
        self._n_batches_in_step = state["n_batches_in_step"]
        self.n_steps = state["n_steps"]
