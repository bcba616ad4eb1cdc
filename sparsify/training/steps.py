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
from sparsify.training.accumulation import GradientMean, add_gradients, merge_rows
from sparsify.training.config import TrainingConfig
from sparsify.training.optimizers import checked_state
from sparsify.training.schedules import build_lr_schedulers
from sparsify.training.state_check import (
    check_like,
    check_tensor,
    describe,
    is_count,
    require,
)


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
            "gradients": [gradient for mean in self._means for gradient in mean.gradients],
            "n_items": [(mean.n_first, mean.n_items) for mean in self._means],
            "n_batches_in_step": self._n_batches_in_step,
            "n_steps": self.n_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Only what training changes is read: settings and schedule are those of this run.

        Raises:
            MisfitError: The state does not fit optimizers or parameters; nothing has been loaded.
        """
        n_steps, n_batches = state["n_steps"], state["n_batches_in_step"]
        require(is_count(n_steps), n_steps, "a number of steps", "stepper.n_steps")
        is_part = is_count(n_batches) and n_batches < self.n_accumulation_steps
        expected = f"less than {self.n_accumulation_steps}"
        require(is_part, n_batches, expected, "stepper.n_batches_in_step")
        counts = state["n_items"]
        is_of_items = isinstance(counts, list) and all(map(_are_counts, counts)) and counts
        require(bool(is_of_items), counts, "numbers of items", "stepper.n_items")
        parameters = self.parameters * len(counts)
        check_like(state["gradients"], [None] * len(parameters), "stepper.gradients")
        check_like(state["optimizers"], [{}] * len(self.optimizers), "stepper.optimizers")
        gradients = [
            checked_gradient(gradient, parameter, f"stepper.gradients.{index}")
            for index, (gradient, parameter) in enumerate(
                zip(state["gradients"], parameters, strict=True)
            )
        ]
        states = [
            checked_state(optimizer, saved, n_steps, f"stepper.optimizers.{index}")
            for index, (optimizer, saved) in enumerate(
                zip(self.optimizers, state["optimizers"], strict=True)
            )
        ]

        for optimizer, content in zip(self.optimizers, states, strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": content, "param_groups": groups})
        for scheduler in self.schedulers:
            scheduler.last_epoch = n_steps
            for index, group in enumerate(scheduler.optimizer.param_groups):
                group["lr"] = scheduler.base_lrs[index] * scheduler.lr_lambdas[index](n_steps)
        self._means = [GradientMean(self.parameters) for _ in counts]
        rest = iter(gradients)
        for mean, (n_first, n_items) in zip(self._means, counts, strict=True):
            mean.n_first, mean.n_items = n_first, n_items
            mean.gradients = [next(rest) for _ in self.parameters]
        self._n_batches_in_step = n_batches
        self.n_steps = n_steps


def _are_counts(pair: object) -> bool:
    """Return whether a pair is the items of the first batch, and those of all."""
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(is_count, pair))):
        return False
    return pair[0] <= pair[1] and (pair[0] > 0) == (pair[1] > 0)


def checked_gradient(found: object, parameter: Tensor, entry: str) -> Tensor | None:
    """Return a saved gradient where its parameter is, if it fits it: dense, or sparse in rows.

    Raises:
        MisfitError: It does not.
    """
    if found is None:
        return None
    if not (type(found) is Tensor and found.layout is torch.sparse_coo):
        return torch.empty_like(parameter).copy_(check_tensor(found, parameter, entry))
    is_of_rows = found.shape == parameter.shape and found.sparse_dim() == 1
    require(is_of_rows, found, f"rows of {describe(parameter)}", entry)
    rows, values = found._indices(), found._values()
    n_rows, *width = len(found), *parameter.shape[1:]
    like = torch.zeros((1, rows.shape[1]), dtype=torch.int64)
    check_tensor(rows, like, f"{entry}.indices")
    check_tensor(values, parameter.new_empty((rows.shape[1], *width)), f"{entry}.values")
    require(bool((rows < n_rows).all()), found, f"indices below {n_rows}", entry)
    # Whether rows are in order, which kernels rely on, is seen here again.
    gradient = torch.sparse_coo_tensor(
        rows.contiguous(), values.contiguous(), parameter.shape, check_invariants=True
    )
    return merge_rows(gradient.to(parameter.device))
