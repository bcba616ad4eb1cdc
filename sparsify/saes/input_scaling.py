"""Scaling of what an SAE reads, token by token, which is undone in what it writes.

With d the width of the activation x, and the mean m and the standard deviation s of its d entries
(the latter divided by d - 1, as `torch.std` does):

    layer_norm      scaled = (x - m) / (s + 1e-5)    output = s * decoded + m
    constant_norm   scaled = sqrt(d) x / |x|         output = |x| / sqrt(d) * decoded

The first is that of the SAEs of Gao et al. 2024 (https://github.com/openai/sparse_autoencoder) and,
with the second, called `constant_norm_rescale` there, of SAELens.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sparsify.saes.scaling_names import InputScaling

LAYER_NORM_EPS = 1e-5
MIN_NORM = 1e-12
"""An activation of a smaller norm is scaled as if it had this one, so that zeros stay zeros."""


@dataclass(frozen=True)
class Scale:
    """How tokens are scaled: `scaled = (x - shift) / divisor`, `output = factor * decoded + shift`.

    The divisor of a layer norm is a little more than its factor.
    """

    factor: Float[Tensor, "*sample 1"]
    divisor: Float[Tensor, "*sample 1"]
    shift: Float[Tensor, "*sample 1"] | None


def scale_of(input: Float[Tensor, "*sample d_act"], how: InputScaling) -> Scale | None:
    """Return how each token is scaled. None: `how` is "none"."""
    if how == "none":
        return None
    if how == "constant_norm":
        norm = input.norm(dim=-1, keepdim=True).clamp(min=MIN_NORM) / input.shape[-1] ** 0.5
        return Scale(factor=norm, divisor=norm, shift=None)
    std = input.std(dim=-1, keepdim=True)
    return Scale(std, std + LAYER_NORM_EPS, input.mean(dim=-1, keepdim=True))


def scaled(
    input: Float[Tensor, "*sample d_act"], scale: Scale | None
) -> Float[Tensor, "*sample d_act"]:
    """Return activations as the encoder reads them."""
    if scale is None:
        return input
    return (input if scale.shift is None else input - scale.shift) / scale.divisor


def unscaled(
    decoded: Float[Tensor, "*sample d_out"], scale: Scale | None
) -> Float[Tensor, "*sample d_out"]:
    """Return what is written, from what a code stands for."""
    if scale is None:
        return decoded
    output = decoded * scale.factor
    return output if scale.shift is None else output + scale.shift
