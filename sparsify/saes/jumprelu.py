"""The JumpReLU SAE of Rajamanoharan et al. 2024 (arXiv:2407.14435).

    z = W_enc (input - b_dec) + b_enc
    c = z where z > theta, zero elsewhere
    output = D c + b_dec

with a threshold theta > 0 of each element. Neither c nor the number of active entries, L0, has a
derivative by theta that helps, so with K = 1 inside (-1/2, 1/2), 0 outside, and a bandwidth eps

    d c / d theta  := -(theta / eps) K((z - theta) / eps)
    d L0 / d theta := -(1 / eps) K((z - theta) / eps)

take their place: straight-through estimates, whose mean over many tokens is that of the derivative
of the expected loss. d c / d z is 1 where c is not zero; L0 gives z no gradient.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsify.saes.acts import SAEActs
from sparsify.saes.base import NewElements
from sparsify.saes.linear import LinearSAE


class JumpReLU(torch.autograd.Function):
    """`z` where it is above the threshold of its element, zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        """`ctx: Any`, as torch's stub does not declare what a context keeps."""
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """The gradients of z and of the threshold."""
        z, threshold = ctx.saved_tensors
        in_window = (z - threshold).abs() < ctx.bandwidth / 2
        by_threshold = -threshold / ctx.bandwidth * _sum_to_last(grad * in_window)
        return grad * (z > threshold), by_threshold, None


class Step(torch.autograd.Function):
    """1 where `z` is above the threshold of its element, zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        """`ctx: Any`, as torch's stub does not declare what a context keeps."""
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        """The gradient of the threshold."""
        z, threshold = ctx.saved_tensors
        in_window = (z - threshold).abs() < ctx.bandwidth / 2
        return None, -_sum_to_last(grad * in_window) / ctx.bandwidth, None


def _sum_to_last(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).sum(dim=0)


class JumpReLUSAE(LinearSAE):
    """Keeps pre-activations above thresholds that are learned.

    Args:
        d_act: Width of the activation.
        n_dict: Dictionary elements.
        bandwidth: Width of the window in which a pre-activation gives its threshold a gradient.
        initial_threshold: Value at which the thresholds start.
        d_out: As in `LinearSAE`.
    """

    def __init__(
        self,
        d_act: int,
        n_dict: int,
        bandwidth: float,
        initial_threshold: float,
        d_out: int | None = None,
    ) -> None:
        super().__init__(d_act, n_dict, d_out)
        self.bandwidth = bandwidth
        self.initial_threshold = initial_threshold
        # Its logarithm, so that it stays positive.
        self.log_threshold = nn.Parameter(torch.full((n_dict,), math.log(initial_threshold)))

    @property
    def threshold(self) -> Float[Tensor, " n_dict"]:
        """The threshold of each element."""
        return self.log_threshold.exp()

    def activate(
        self, pre_acts: Float[Tensor, "*sample n_dict"]
    ) -> Float[Tensor, "*sample n_dict"]:
        """Pre-activations above their threshold, and zeros."""
        c = JumpReLU.apply(pre_acts, self.threshold, self.bandwidth)
        assert isinstance(c, Tensor)
        return c

    def forward(self, input: Float[Tensor, "*sample d_act"]) -> SAEActs:
        """The input, its code and its reconstruction, and the pre-activations."""
        pre_acts = self.affine(self.centred(input))
        c = self.activate(pre_acts)
        return self.acts_of(input, c, pre_acts=pre_acts)

    def active(self, acts: SAEActs) -> Float[Tensor, "*sample n_dict"]:
        """1 where an element is active, with the straight-through gradient of the thresholds."""
        assert acts.pre_acts is not None
        active = Step.apply(acts.pre_acts, self.threshold, self.bandwidth)
        assert isinstance(active, Tensor)
        return active

    def element_parameters(self) -> list[nn.Parameter]:
        """Parameters of every linear SAE, and the thresholds."""
        return [*super().element_parameters(), self.log_threshold]

    @torch.no_grad()
    def reset_elements(self, new: NewElements) -> None:
        """Reset elements, with the threshold that all started with."""
        super().reset_elements(new)
        self.log_threshold[new.index] = math.log(self.initial_threshold)
