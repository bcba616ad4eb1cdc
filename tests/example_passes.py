"""Passes that are small enough to compute every loss term of them by hand."""

import math

import torch
from torch import Tensor

from sparsify.kernels.unembedding import Unembedding
from sparsify.losses.kept import NO_TARGET
from sparsify.losses.passes import Passes
from sparsify.saes.acts import CacheActs, SAEActs

FIRST, SECOND, LATER = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


def one_token_passes() -> Passes:
    """Two SAEs on activations of width 2, a cached position, and a vocabulary of two tokens."""
    return Passes(
        orig_acts={
            FIRST: torch.tensor([[1.0, 1.0]]),
            SECOND: torch.tensor([[0.0, 2.0]]),
            LATER: torch.tensor([[1.0, 0.0]]),
        },
        new_acts={
            FIRST: sae_acts(input=[[1, 1]], c=[[1, 0, 3]], output=[[1, 3]]),
            SECOND: sae_acts(input=[[0, 1]], c=[[0, 2, 0]], output=[[3, 1]]),
            LATER: CacheActs(input=leaf([[2, 1]])),
        },
        orig_resid=torch.tensor([[0.0, 0.0]]),
        new_resid=leaf([[0, math.log(3)]]),
        unembed=Unembedding(torch.eye(2)),
    )


def two_token_passes() -> Passes:
    """Two SAEs on activations of width 2, two tokens, and a vocabulary of two."""
    first = sae_acts(input=[[1, 1], [0, 0]], c=[[1, 0, 3], [0, 0, 0]], output=[[1, 3], [2, 0]])
    second = sae_acts(input=[[0, 1], [1, 0]], c=[[0, 2, 0], [0, 4, 0]], output=[[3, 1], [1, 2]])
    return Passes(
        orig_acts={},
        new_acts={FIRST: first, SECOND: second},
        orig_resid=torch.zeros(2, 2),
        new_resid=leaf([[0, math.log(3)], [0, 0]]),
        unembed=Unembedding(torch.eye(2)),
        next_tokens=torch.tensor([1, NO_TARGET]),
    )


def leaf(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, requires_grad=True)


def sae_acts(**values: list[list[float]]) -> SAEActs:
    return SAEActs(**{name: leaf(rows) for name, rows in values.items()})


def floats(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}
