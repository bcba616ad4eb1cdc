"""The door by which a model reads tokens: checked ids, or text, never cut to the model's context.

TransformerLens takes an id below zero as one counted from the end of the vocabulary, and cuts a
text that is too long without a word. Here whoever runs the model says so.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from jaxtyping import Int
from torch import Tensor

from sparsify.settings.base_config import UserError

TokensOrText = Tensor | str | Sequence[Any]
"""Token ids of shape `batch pos` or `pos`, of any integer type or as lists, a text, or several."""


def to_tokens(
    model: Any,  # a `TLensModel`
    text: str | list[str],
    **options: Any,  # what TransformerLens's `to_tokens` takes
) -> Int[Tensor, "batch pos"]:
    """Tokens of a text, or of several, of which the shorter are padded.

    Args:
        model: Model with a tokenizer.
        text: One text or several.
        **options: `prepend_bos`, `padding_side`, ..., as TransformerLens's `to_tokens` takes them,
            except that `truncate` is False by default.

    Raises:
        UserError: The model has no tokenizer.
    """
    if model.tokenizer is None:
        raise UserError("text: the model has no tokenizer; give token ids")
    return model.to_tokens(text, **{"truncate": False, **options})


def to_str_tokens(
    model: Any,  # a `TLensModel`
    input: TokensOrText | Int[Tensor, " pos"],
    **options: Any,  # as above
) -> list[Any]:  # of strings, or of lists of strings
    """Each token of a text, or of a sequence of tokens, as a string. A list for each of several."""
    if isinstance(input, list):
        return [to_str_tokens(model, text, **options) for text in input]
    tokens = to_tokens(model, input, **options)[0] if isinstance(input, str) else input
    return model.to_str_tokens(tokens)


def as_tokens(
    model: Any,  # a `TLensModel`
    input: TokensOrText,
) -> Int[Tensor, "batch pos"]:
    """Token ids, or tokens of texts. Of several texts the shorter are padded at their end.

    There padding changes nothing before it, as a token is not seen by those that precede it.

    Raises:
        UserError: They are not ids of the model's tokens, not one or several sequences, or texts
            for a model without a tokenizer.
    """
    if isinstance(input, str):
        return to_tokens(model, input)
    if is_texts(input):
        return to_tokens(model, list(input), padding_side="right")
    if isinstance(input, Sequence) and len(input) == 0:
        raise UserError("tokens: the list is empty; give at least one text or sequence")
    ids = as_ids(model, input, "tokens")
    if ids.ndim not in (1, 2):
        raise UserError(
            f"tokens: have shape {tuple(ids.shape)}; give one sequence, or several of shape "
            "(batch, position)"
        )
    return ids if ids.ndim == 2 else ids[None]


def is_texts(input: object) -> TypeGuard[Sequence[str]]:
    """Return whether an input is several texts.

    Raises:
        UserError: Some of it is text, and some is not.
    """
    if not isinstance(input, Sequence) or isinstance(input, str):
        return False
    are_texts = [isinstance(part, str) for part in input]
    if any(are_texts) and not all(are_texts):
        other = type(input[are_texts.index(False)]).__name__
        raise UserError(f"tokens: a list of texts also holds something else ({other}); remove it")
    return any(are_texts)


def as_ids(
    model: Any,  # a `TLensModel`
    given: object,
    setting: str,
) -> Int[Tensor, "..."]:
    """Token ids in the type that models take, on the device of the model.

    Raises:
        UserError: They are not whole numbers, or not ids of the model's vocabulary. `setting` is
            what they were given as.
    """
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):  # depends on what is given
        raise UserError(
            f"{setting}: a {type(given).__name__} of this content holds no token ids; give text, "
            "or whole numbers of shape (batch, position), with rows of one length"
        ) from None
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise UserError(f"{setting}: have type {ids.dtype}, but token ids are whole numbers")
    ids = ids.to(next(model.parameters()).device, torch.int64)
    d_vocab = model.cfg.d_vocab
    is_bad = (ids < 0) | (ids >= d_vocab)
    if is_bad.any():
        place = tuple(is_bad.nonzero()[0].tolist())
        raise UserError(
            f"{setting}: {ids[place].item()}, at {place}, is not a token id; the model's are 0 to "
            f"{d_vocab - 1}"
        )
    return ids


def flush_right(
    model: Any,  # a `TLensModel`
    prompts: Int[Tensor, "batch pos"],
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"]]:
    """Move the padding of prompts to their start, as a model needs it that continues them.

    Where a text may begin or end with the padding token, padding is that of which other prompts
    have less.

    Returns:
        The prompts, and the number of padding tokens with which each begins.
    """
    n_pad = torch.zeros_like(prompts[:, 0])
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.pad_token_id is None:
        return prompts, n_pad
    is_pad = prompts == tokenizer.pad_token_id
    n_at_end, n_at_start = (
        side.int().cumprod(dim=1).sum(dim=1).clamp(max=prompts.shape[1] - 1)
        for side in (is_pad.flip(1), is_pad)
    )
    if tokenizer.pad_token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        n_at_end, n_at_start = (n - n.amin() for n in (n_at_end, n_at_start))
    if not n_at_end.any():
        return prompts, n_at_start
    places = torch.arange(prompts.shape[1], device=prompts.device)
    return prompts.gather(1, (places - n_at_end[:, None]) % prompts.shape[1]), n_at_end


def padding_options(
    model: Any,  # a `TLensModel`
    prompts: Int[Tensor, "batch pos"],
    n_pad: Int[Tensor, " batch"],
) -> dict[str, Any]:  # a text and a boolean
    """Options by which TransformerLens's `generate` masks the padding that `flush_right` found.

    Without them it would mask padding tokens at the end, where a prompt may have one as EOS.

    Raises:
        UserError: Some prompts begin with BOS and others do not, and padding is the same token.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.pad_token_id is None:
        return {}
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    if not n_pad.any() and not (prompts[:, -1] == pad).any():
        return {}
    begins_with_bos = prompts.gather(1, n_pad[:, None]) == bos
    if bos == pad and begins_with_bos.any() != begins_with_bos.all():
        raise UserError(
            "tokens: some of the prompts begin with BOS and some do not, and BOS is also the "
            "padding; give all of them with it, or one at a time"
        )
    return {"padding_side": "left", "prepend_bos": bool(begins_with_bos.all())}


def check_equal_lengths(
    model: Any,  # a `TLensModel`
    input: TokensOrText,
) -> None:
    """Raise a `UserError` if places of tokens are not the same in all prompts of a batch."""
    if isinstance(input, str):
        return
    if is_texts(input):
        lengths = [to_tokens(model, text).shape[-1] for text in input]
    else:
        prompts, n_pad = flush_right(model, as_tokens(model, input))
        lengths = (prompts.shape[1] - n_pad).tolist()
    if len(set(lengths)) > 1:
        raise UserError(
            f"interventions: tokens: are counted from the start of a prompt, and the prompts "
            f"have {', '.join(map(str, lengths))} tokens; give prompts of one length, or one "
            "at a time"
        )
