"""Gradients of means over all items of an optimizer step, whose batches may hold different numbers.

The mean over all items is the sum over batches of the batch's mean times n / N, with n the items of
the batch and N those of the step. N is known only when the last batch has come, so

    gradient = correction * sum over batches of (n / n_first) / n_batches * gradient of their mean
    correction = n_batches * n_first / N

where n_first is the number of items of the first batch that has some. If all batches have as many,
both factors are exactly 1, and nothing is rounded that would not be in a mean over batches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsify.losses.total import MeanLoss


class GradientMean:
    """Gradient of the mean over the items of all batches of a step."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.gradients: list[Tensor | None] = [None] * len(parameters)
        """Gradients before the correction."""
        self.n_first = 0
        self.n_items = 0
        """Items of all batches so far."""

    def add(self, loss: MeanLoss, n_batches: int, *, retain_graph: bool) -> None:
        """Add the gradient of a batch.

        Args:
            loss: Mean over the items of the batch.
            n_batches: Batches in a step.
            retain_graph: Whether another gradient of the same passes will be taken.
        """
        if loss.n == 0:
            return
        self.n_first = self.n_first or loss.n
        self.n_items += loss.n
        if not loss.mean.requires_grad:  # a term that had nothing to do, as if no element is dead
            return
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        weighted = (loss.n / self.n_first) * loss.mean
        (weighted / n_batches).backward(retain_graph=retain_graph)
        self.gradients = [_merged(parameter.grad) for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None

    def take(self, n_batches: int) -> list[Tensor | None]:
        """Return the gradient of the whole step. This object must not be used any more."""
        correction = n_batches * self.n_first / self.n_items if self.n_items else 1.0
        if correction != 1:
            for gradient in self.gradients:
                if gradient is not None:
                    (gradient._values() if gradient.is_sparse else gradient).mul_(correction)
        return self.gradients


def add_gradients(means: Sequence[list[Tensor | None]]) -> list[Tensor | None]:
    """Add gradients by parameter. None is that of a parameter on which nothing depends."""
    total, *others = means
    for other in others:
        total = [_added(a, b) for a, b in zip(total, other, strict=True)]
    return total


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    # Torch adds a sparse tensor to a dense one, but not the other way round.
    return _merged(b + a if a.is_sparse else a + b)


def _merged(gradient: Tensor | None) -> Tensor | None:
    return merge_rows(gradient) if gradient is not None and gradient.is_sparse else gradient


def merge_rows(gradient: Tensor) -> Tensor:
    """A row-sparse gradient with each row once, or dense if most rows are there."""
    # The gradients of several batches are added by listing the rows of each, and even that of one
    # batch loses its mark as being in order, without which torch would sort and copy the rows.
    (index,) = gradient._indices()
    if not (index[1:] > index[:-1]).all():
        gradient = gradient.coalesce()
        return gradient if 2 * len(gradient.values()) <= len(gradient) else gradient.to_dense()
    return torch.sparse_coo_tensor(
        gradient._indices(),
        gradient._values(),
        gradient.shape,
        is_coalesced=True,
        check_invariants=False,
    )
