"""Operations on single logits in one sweep over them, compiled by torch.

Torch's own kernels are called one after the other, each of which reads and writes all logits of a
tile. torch.compile makes one kernel of them: C++ on a CPU, which needs a compiler, Triton on a GPU.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor


@no_type_check  # or the compiler would meet the code that checks shapes in tests
def kl_of_rows(
    orig: Float[Tensor, "row d_vocab"], logits: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " row"]:
    """KL(orig || new) of each row in nats; p_new - p_orig takes the place of the new `logits`.

    With both rows shifted by their maxima, so that the largest number is 0, and Z the sum of its
    exponentials, KL(orig || new) = sum p_orig * (orig - logits) + log Z_new - log Z_orig. Each
    exponential is thus taken once. Where p_orig is 0, so is the product.
    """
    new = logits - logits.amax(dim=-1, keepdim=True)
    orig = orig - orig.amax(dim=-1, keepdim=True)
    exp_new, exp_orig = new.exp(), orig.exp()
    z_new, z_orig = exp_new.sum(dim=-1, keepdim=True), exp_orig.sum(dim=-1, keepdim=True)
    products = (exp_orig * (orig - new)).masked_fill(exp_orig == 0, 0.0)
    difference = products.sum(dim=-1, keepdim=True) / z_orig
    logits.copy_(exp_new / z_new - exp_orig / z_orig)
    return (difference + z_new.log() - z_orig.log()).squeeze(-1)


@cache
def compiled_kl_of_rows() -> Callable[[Tensor, Tensor], Tensor]:
    """`kl_of_rows`, compiled for any number of rows, in its first call (seconds)."""
    with warnings.catch_warnings():
        # torch 2.13 loads a part of itself that it deprecates.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return torch.compile(kl_of_rows, dynamic=True)


def why_not_compiled(device: torch.device) -> str | None:
    """Reason why torch cannot compile for a device. None: it can."""
    try:
        compiled_kl_of_rows()(torch.zeros(2, 8, device=device), torch.zeros(2, 8, device=device))
    # No compiler, one that fails, no Triton, or an operating system that torch does not know: each
    # raises other errors.
    except Exception as error:  # noqa: BLE001
        return str(error).partition("\n")[0]
    return None
