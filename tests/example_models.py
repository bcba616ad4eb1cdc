"""Small models for tests of fused kernels."""

from typing import Any

import torch

from sparsify.tlens.hooked_model import HookedModel

SIZES = {"n_layers": 2, "d_model": 12, "n_heads": 3, "d_head": 4, "d_mlp": 20, "n_ctx": 16}


def with_other_parameters(model: Any) -> HookedModel:  # a TransformerLens model of either kind
    """A frozen model in which biases and the weights of norms are not those of a new one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return HookedModel(model.requires_grad_(False))
