"""The tokens and predictions that losses and metrics count.

A prediction counts if its position and its target, the token after it, are both kept. What is
measured at a position alone (KL, L0, reconstruction) counts wherever the position is kept.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from sparsify.losses.ignored_tokens import IgnoredTokens

NO_TARGET = -100
"""Stands for the target of a prediction that does not count, as in torch's losses."""


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


def targets_of(
    tokens: Int[Tensor, "batch pos"], kept: Bool[Tensor, "batch pos"] | None = None
) -> Int[Tensor, "batch pos"]:
    """The token after each position, `NO_TARGET` for the last, and where no prediction counts.

    Args:
        tokens: Sequences of tokens.
        kept: True for each token that is kept. None: all.
    """
    targets = F.pad(tokens[:, 1:].long(), (0, 1), value=NO_TARGET)
    return targets if kept is None else counted_targets(targets, kept)


def counted_targets(
    targets: Int[Tensor, "batch pos"], kept: Bool[Tensor, "batch pos"]
) -> Int[Tensor, "batch pos"]:
    """Targets of the predictions that count if only some tokens are kept, else `NO_TARGET`.

    Args:
        targets: From `targets_of`.
        kept: True for each token that is kept.
    """
    is_next_kept = F.pad(kept[:, 1:], (0, 1), value=False)
    return targets.where(kept & is_next_kept, NO_TARGET)
