"""Techniques that make a step fast. Each can be switched off to see what it saves."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import Adam

from sparsify.kernels.reference import full_kl
from sparsify.kernels.sparse import _from_rows
from sparsify.scripts.benchmark.shapes import TECHNIQUES
from sparsify.tlens.fused_attention import FusedAttention
from sparsify.tlens.fused_blocks import FusedBlocks
from sparsify.tlens.hooked_model import HookedModel, Prefix


def _norm_of_code(c: Tensor, d_act: int, p_norm: float) -> Tensor:
    return torch.linalg.vector_norm(c, ord=p_norm, dim=-1).mean() / d_act


# What takes the place of each. `Any`: `patch` has no public type of its own.
_PLAIN_WAYS: dict[str, list[Any]] = {
    "shared-prefix": [
        patch.object(HookedModel, "prefix", lambda self, tokens, n_blocks: Prefix(tokens))
    ],
    "chunked-kl": [patch("sparsify.losses.values.chunked_kl", full_kl)],
    "fused-blocks": [
        patch.object(FusedBlocks, "is_plain", lambda self: False),
        patch.object(FusedAttention, "is_free", lambda self, part: False),
    ],
    "sparse-sae": [patch("sparsify.saes.linear.find_active", lambda c, d_act: None)],
    "row-sparse-adam": [
        patch(
            "sparsify.kernels.sparse._from_rows",
            lambda rows, active, n_dict, is_sparse: _from_rows(rows, active, n_dict, False),
        ),
        patch(
            "sparsify.training.optimizers.RowSparseAdam",
            lambda parameters, lr, fused: Adam(parameters, lr=lr),
        ),
    ],
    "sum-of-code": [patch("sparsify.losses.values.sparsity", _norm_of_code)],
}
assert set(_PLAIN_WAYS) == set(TECHNIQUES)


@contextmanager
def switched_off(names: Iterable[str]) -> Iterator[None]:
    """A context in which steps do without some of `TECHNIQUES`: the plain way takes their place."""
    with ExitStack() as stack:
        for name in names:
            for plain_way in _PLAIN_WAYS[name]:
                stack.enter_context(plain_way)
        yield
