"""Batches of an evaluation, token ids or texts, and the tokens of them that count."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparsify.sae_transformer import SAETransformer
from sparsify.settings.base_config import UserError
from sparsify.tlens.text import as_ids, is_texts

Batches = Iterable[Tensor | Sequence[Any] | str] | str
"""Token ids of shape `batch pos`, which may differ between batches. A text is a batch of one."""

Kept = Callable[[Tensor], Tensor]
"""A function from the tokens of a batch to a mask, true for those that count."""


def read_batches(
    model: SAETransformer, batches: Iterable[object]
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Tokens of each batch of `Batches`, on the device of the model.

    Raises:
        UserError: A batch is neither token ids nor a text, or a sequence has no next token to
            predict, or more tokens than the model's context.
    """
    for batch in [batches] if isinstance(batches, str) else batches:
        if isinstance(batch, str):
            tokens = text_tokens(model, batch, "batches")
        elif is_texts(batch):
            raise UserError(
                "batches: one is a list of texts, whose padding would count; give each text as a "
                "batch of its own"
            )
        else:
            tokens = as_ids(model.tlens_model, batch, "batches")
        yield _checked(model, tokens)


def kept_tokens_of(
    kept: Kept | None, tokens: Int[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"] | None:
    """Mask of the tokens of a batch that count. None: all do.

    Raises:
        UserError: The function gives no boolean for each token.
    """
    if kept is None:
        return None
    mask = kept(tokens)
    if mask.shape != tokens.shape or mask.dtype != torch.bool:
        raise UserError(
            f"kept: gives {mask.dtype} of shape {tuple(mask.shape)} for tokens of shape "
            f"{tuple(tokens.shape)}; give a boolean for each token"
        )
    return mask.to(tokens.device)


def check_predictions(n_read: int, n_predictions: int) -> None:
    """Raise a `UserError` if of the tokens that were read none is to be predicted."""
    if n_read == 0:
        raise UserError("batches: hold no tokens; give at least one batch")
    if n_predictions == 0:
        raise UserError(
            f"kept: leaves no prediction of the next token in {n_read} tokens; a prediction counts "
            "if its token and the next one are kept, so keep two that follow each other"
        )


def text_tokens(model: SAETransformer, text: str, setting: str) -> Int[Tensor, "1 pos"]:
    """Tokens of a text as by `SAETransformer.to_tokens`.

    Raises:
        UserError: The model has no tokenizer. `setting` is what the text was given as.
    """
    _check_tokenizer(model, setting)
    return model.to_tokens(text)


def token_id(model: SAETransformer, token: int | str, setting: str) -> int:
    """Id of a token, which is given as that or as its text.

    Raises:
        UserError: The text is not one token, or the model has no tokenizer.
    """
    if not isinstance(token, str):
        return token
    _check_tokenizer(model, setting)
    tokenizer = model.tlens_model.tokenizer
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        parts = [tokenizer.decode([part]) for part in ids]
        raise UserError(
            f"{setting}: {token!r} is {len(ids)} tokens, {parts}; give the text or the id of one"
        )
    return ids[0]


def _check_tokenizer(model: SAETransformer, setting: str) -> None:
    if getattr(model.tlens_model, "tokenizer", None) is None:
        raise UserError(f"{setting}: is text, and the model has no tokenizer; give token ids")


def _checked(model: SAETransformer, tokens: Tensor) -> Tensor:
    if tokens.ndim != 2:
        raise UserError(
            f"batches: a batch of shape {tuple(tokens.shape)}; give a list of batches, each a text "
            "or token ids of shape (batch, position)"
        )
    model.hooked_model.check_length(tokens.shape[1])
    if tokens.shape[1] < 2:
        raise UserError(
            f"batches: a sequence of {tokens.shape[1]} tokens has no next token to predict; "
            "give 2 tokens or more"
        )
    return tokens
