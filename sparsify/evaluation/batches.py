"""Batches of an evaluation."""

from collections.abc import Iterable, Iterator

from jaxtyping import Int
from torch import Tensor

from sparsify.sae_transformer import SAETransformer

Batches = Iterable[Int[Tensor, "_ _"]]
"""Token ids of shape `batch pos`, which may differ between batches."""


def read_batches(model: SAETransformer, batches: Batches) -> Iterator[Int[Tensor, "batch pos"]]:
    """Tokens of each batch, on the device of the model.

    Raises:
        ValueError: A batch is not token ids, or a sequence has no next token to
            predict, or more tokens than the model's context.
    """
    for tokens in batches:
        _check(model, tokens)
        yield tokens.to(model.device)


def _check(model: SAETransformer, tokens: object) -> None:
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"batches: a {type(tokens).__name__} is not a batch; give a list of batches, each a "
            "tensor of token ids of shape (batch, position)"
        )
    if tokens.ndim != 2:
        raise ValueError(
            f"batches: a batch of shape {tuple(tokens.shape)}; give a list of batches, each of "
            "shape (batch, position)"
        )
    model.hooked_model.check_length(tokens.shape[1])
    if tokens.shape[1] < 2:
        raise ValueError(
            f"batches: a sequence of {tokens.shape[1]} tokens has no next token to predict; "
            "give 2 tokens or more"
        )
