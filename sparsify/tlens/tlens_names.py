"""Names that users of TransformerLens type: those of models, and of their methods and parts."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sparsify.tlens.hooked_model import TLensModel
from sparsify.tlens.text import to_str_tokens, to_tokens


def as_model(model: TLensModel | str) -> TLensModel:
    """The model itself, or the one of that name with folded layer norms."""
    if not isinstance(model, str):
        return model
    # It imports TransformerLens, which takes seconds.
    from sparsify.tlens.loading import load_hooked_model

    return load_hooked_model(model, None, "folded")


class TLensNames:
    """Text, config and hook points of `tlens_model`, for a class that wraps it."""

    tlens_model: TLensModel

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.tlens_model.parameters()).device

    @property
    def cfg(self) -> Any:  # one of several configs of TransformerLens
        """Config of the model."""
        return self.tlens_model.cfg

    @property
    def tokenizer(self) -> Any:  # which TransformerLens does not declare
        """Tokenizer of the model. None: it has none."""
        return self.tlens_model.tokenizer

    @property
    def hook_dict(self) -> Mapping[str, nn.Module]:
        """Hook points of the model by name, with their aliases."""
        return self.tlens_model.hook_dict

    def to_tokens(
        self,
        text: str | list[str],
        **options: Any,  # what TransformerLens's method takes
    ) -> Int[Tensor, "batch pos"]:
        """Tokens of a text, which is not cut: see `sparsify.tlens.text.to_tokens`."""
        return to_tokens(self.tlens_model, text, **options)

    def to_str_tokens(
        self,
        input: Any,  # what TransformerLens's method takes
        **options: Any,  # also
    ) -> list[Any]:  # of strings, or of lists of strings
        """Each token as a string: see `sparsify.tlens.text.to_str_tokens`."""
        return to_str_tokens(self.tlens_model, input, **options)

    def to_string(self, tokens: Any) -> str | list[str]:  # a tensor, or lists of token ids
        """Text of tokens."""
        return self.tlens_model.to_string(tokens)

    def to_single_token(self, string: str) -> int:
        """Token id of a string that is one token."""
        return self.tlens_model.to_single_token(string)
