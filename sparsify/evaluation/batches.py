"""Batches of an evaluation: token ids, or texts."""

from collections.abc import Iterable, Iterator

from jaxtyping import Int
from torch import Tensor

from sparsify.sae_transformer import SAETransformer
from sparsify.settings.base_config import UserError

Batches = Iterable[Int[Tensor, "_ _"] | str] | str
"""Token ids of shape `batch pos`, which may differ between batches. A text is a batch of one."""


def read_batches(
    model: SAETransformer, batches: Iterable[object]
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Tokens of each batch of `Batches`, on the device of the model.

    Raises:
        ValueError: A batch is neither token ids nor a text, or a sequence has no next token to
            predict, or more tokens than the model's context.
    """
    for batch in [batches] if isinstance(batches, str) else batches:
        tokens = text_tokens(model, batch, "batches") if isinstance(batch, str) else batch
        yield _checked(model, tokens).to(model.device)


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


def _checked(model: SAETransformer, tokens: object) -> Tensor:
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"batches: a {type(tokens).__name__} is not a batch; give a list of batches, each a "
            "text, or a tensor of token ids of shape (batch, position)"
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
    return tokens
