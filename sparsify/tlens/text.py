"""Text as a model reads it: tokens, never cut to the model's context.

TransformerLens cuts a text that is too long without a word. Here whoever runs the model says so.
"""

from typing import Any

from jaxtyping import Int
from torch import Tensor

from sparsify.settings.base_config import UserError

TokensOrText = Int[Tensor, "batch pos"] | str | list[str]
"""Token ids, a text, or a batch of texts."""


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
    """Tokens as they are, or those of texts. Of several texts the shorter are padded at their end.

    There padding changes nothing before it, as a token is not seen by those that precede it.
    """
    if isinstance(input, Tensor):
        return input
    return to_tokens(model, input, padding_side="right")


def check_not_padded(
    model: Any,  # a `TLensModel`
    prompts: Int[Tensor, "batch pos"],
) -> None:
    """Raise a `UserError` if prompts end with padding, which would be continued as text."""
    if model.tokenizer is None or model.tokenizer.pad_token_id is None:
        return
    is_padded = prompts[:, -1] == model.tokenizer.pad_token_id
    # A prompt may be that token alone, where it also begins a text.
    if is_padded.any() and not is_padded.all():
        row = int(is_padded.int().argmax())
        raise UserError(
            f"tokens: sequence {row} ends with padding; give prompts of different length as a list "
            "of texts"
        )


def check_equal_lengths(
    model: Any,  # a `TLensModel`
    input: TokensOrText,
) -> None:
    """Raise a `UserError` if places of tokens are not the same in all texts of a batch."""
    if isinstance(input, list):
        lengths = [to_tokens(model, text).shape[-1] for text in input]
        if len(set(lengths)) > 1:
            raise UserError(
                f"interventions: tokens: are counted from the start of a prompt, and the prompts "
                f"have {', '.join(map(str, lengths))} tokens; give prompts of one length, or one "
                "at a time"
            )
