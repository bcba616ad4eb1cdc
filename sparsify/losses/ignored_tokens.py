"""Tokens that losses and metrics leave out.

The first position, often BOS, has activations some hundred times as large as the others in many
models, so that a mean over tokens is mostly about it. SAEs still stand in for activations there.
The mask of a batch is computed in `kept.py`.
"""

from typing import Self

from pydantic import NonNegativeInt, model_validator

from sparsify.settings.base_config import BaseConfig, UserError


class IgnoredTokens(BaseConfig):
    """Tokens that losses and metrics leave out."""

    bos: bool = False
    """True leaves out all tokens that are the tokenizer's BOS token."""
    first_n: NonNegativeInt = 0
    """Number of first positions of each sequence that are left out."""

    @model_validator(mode="after")
    def _leaves_something_out(self) -> Self:
        if not self.bos and self.first_n == 0:
            raise ValueError("leaves no token out; set bos or first_n, or remove it")
        return self

    def check(self, bos_token: int | None) -> None:
        """Raise a `UserError` if nobody knows the BOS token."""
        if self.bos and bos_token is None:
            raise UserError(
                "ignored_tokens.bos: the tokenizer of train_data has no BOS token; set first_n "
                "instead"
            )
