"""The mask of the tokens that count, from the config of those that do not."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparsify.losses.ignored_tokens import IgnoredTokens


def kept_mask(
    tokens: Int[Tensor, "batch pos"], ignored: IgnoredTokens, bos_token: int | None
) -> Bool[Tensor, "batch pos"]:
    """True for each token that losses and metrics do not leave out.

    Args:
        tokens: Sequences of tokens.
        ignored: Tokens that are left out.
        bos_token: The tokenizer's BOS token. None if nobody knows it, which `ignored.check` allows
            only if it is not needed.
    """
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[:, : ignored.first_n] = False
    return kept & (tokens != bos_token) if ignored.bos else kept
