"""Losses that train dead dictionary elements: those that do not fire, and so get no gradient.

They train only these elements. The input of the encoder counts as constant: neither earlier SAEs
nor the decoder's bias, by which it is centred, are to learn to wake them.

Dimensions: `*sample` is any leading batch and position dimensions, `n_dict` the number of
dictionary elements.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsify.losses.functions import normalised_mse
from sparsify.saes.acts import SAEActs
from sparsify.saes.base import SAE
from sparsify.saes.jumprelu import JumpReLUSAE
from sparsify.saes.linear import LinearSAE
from sparsify.saes.topk import keep_largest


def aux_k(
    sae: SAE, acts: SAEActs, dead: Bool[Tensor, " n_dict"], k: int | None = None
) -> Float[Tensor, ""]:
    """Error of the k largest dead elements of each sample in predicting what the SAE leaves out.

    Let e = target - output, which has no gradient, and e_dead the sum that the k dead elements with
    the largest positive pre-activations write. The loss is the sum of |e - e_dead|^2, divided by
    the sum of |e - mean e|^2 (Gao et al. 2024, arXiv:2406.04093, section A.2). An element that
    fires on a sample is left out of e_dead there: its part of the target is no longer in e, so the
    gradient would put it back to sleep.

    The value has no unit, while `out_to_in` has that of the squared activation. In an end-to-end
    mix, too, it points dead elements to what is left out of the activation, whether or not the
    model uses that; once they fire, the other terms decide what they become.

    0 if no element is dead.

    Args:
        sae: The SAE whose elements are trained.
        acts: Its activations.
        dead: True for each element that is dead.
        k: Number of dead elements used on a sample. None: half the width of the activation.
    """
    assert isinstance(sae, LinearSAE), "a config with another kind is refused"
    index = dead.nonzero().flatten()
    if len(index) == 0:
        return torch.zeros((), device=dead.device)
    error = (acts.target - acts.output).detach()
    pre_acts = sae.pre_acts_of(acts.input, index).masked_fill(acts.c[..., index] != 0, 0.0)
    c = keep_largest(pre_acts, min(k or max(1, sae.d_act // 2), len(index)))
    return normalised_mse(sae.written_by(c, index, acts.input.detach()), error)


def pre_act(sae: SAE, acts: SAEActs, dead: Bool[Tensor, " n_dict"]) -> Float[Tensor, ""]:
    """Sum over dead elements of relu(threshold - pre-activation), averaged over samples, / d_act.

    Its gradient pulls dead elements up to firing on everything a little, until they do (Anthropic
    2025, https://transformer-circuits.pub/2025/january-update, there over all elements). 0 if no
    element is dead.
    """
    assert isinstance(sae, JumpReLUSAE), "a config with another kind is refused"
    index = dead.nonzero().flatten()
    below = sae.threshold[index] - sae.pre_acts_of(acts.input, index)
    return below.relu().sum(dim=-1).mean() / sae.d_act
