"""The math of the loss terms: tensors in, a scalar out.

Dimensions: `*sample` is any leading batch and position dimensions, `d_act` the width of the
hooked activation, `n_dict` the number of dictionary elements. KL is in `sparsify.kernels.chunked`.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sparsify.saes.acts import SAEActs
from sparsify.saes.base import SAE
from sparsify.saes.jumprelu import JumpReLUSAE

ROUNDING = 100
"""Deviations from the mean by fewer units of rounding than this count as zero."""


def sparsity(c: Float[Tensor, "*sample n_dict"], d_act: int, p_norm: float) -> Float[Tensor, ""]:
    """The p-norm of `c`, (sum c^p)^(1/p), averaged over samples, per dimension of the activation.

    Braun et al. 2024 divide by `d_act`, not `n_dict`, so that one coefficient serves models of
    different width.

    For p other than 1 the derivative at zero is undefined or infinite; an entry that is exactly
    zero gets no gradient then, and neither does a sample whose code is all zeros. A ReLU, or
    whatever else makes the code sparse, passes no gradient at zero anyway.

    Args:
        c: Sparse activations, none of them negative.
        d_act: Width of the activation that the SAE read.
        p_norm: Exponent, above zero. Near zero the norm overflows: in float32 below about 0.05 when
            some tens of entries are active.
    """
    if p_norm == 1:
        # Its gradient is one number, where that of `vector_norm` takes two tensors as large as c.
        return c.sum(dim=-1).mean() / d_act
    return torch.linalg.vector_norm(c, ord=p_norm, dim=-1).mean() / d_act


def concave_sparsity(
    c: Float[Tensor, "*sample n_dict"], d_act: int, penalty: Literal["tanh", "log"]
) -> Float[Tensor, ""]:
    """Sum of tanh(c) or of log(1 + c), averaged over samples, per dimension of the activation.

    Unlike the 1-norm they hardly grow where an entry is large, so they shrink activations less and
    come nearer to a count of those that are not zero.

    Args:
        c: Sparse activations, none of them negative, divided by the size at which the penalty
            bends.
        d_act: Width of the activation that the SAE read.
        penalty: `tanh` or `log`.
    """
    entries = torch.tanh(c) if penalty == "tanh" else torch.log1p(c)
    return entries.sum(dim=-1).mean() / d_act


def active_share(sae: SAE, acts: SAEActs) -> Float[Tensor, ""]:
    """Active elements of a JumpReLU SAE, averaged over samples, per dimension of the activation.

    The gradient is that of `JumpReLUSAE.active`.
    """
    assert isinstance(sae, JumpReLUSAE), "a config with another kind is refused"
    return sae.active(acts).sum(dim=-1).mean() / acts.input.shape[-1]


def mse(
    pred: Float[Tensor, "*sample d_act"], target: Float[Tensor, "*sample d_act"]
) -> Float[Tensor, ""]:
    """Squared difference, averaged over samples and over the activation's dimensions.

    Gradients reach both arguments. The result is in float32 at least, whatever the precision of the
    activations.
    """
    wide = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    return F.mse_loss(pred.to(wide), target.to(wide))


def normalised_mse(
    pred: Float[Tensor, "*sample d_act"], target: Float[Tensor, "*sample d_act"]
) -> Float[Tensor, ""]:
    """Squared error of `pred`, relative to always predicting the mean of `target` over samples.

    0 is perfect, 1 as good as the mean. Also 0 if `target` is the same for all samples except for
    rounding, as there is nothing to divide by then.
    """
    wide = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    rows = target.to(wide).flatten(end_dim=-2)
    variance = (rows - rows.mean(dim=0)).square().sum()
    error = (pred.to(wide) - target.to(wide)).square().sum()
    # Not `where(is_varied, error / variance, 0)`, whose gradient would be 0 / 0.
    is_varied = variance > (ROUNDING * torch.finfo(wide).eps) ** 2 * rows.square().sum()
    return is_varied * error / torch.where(is_varied, variance, 1.0)
