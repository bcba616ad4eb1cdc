"""Which tokens losses and metrics leave out.

The first position, often BOS, has activations some hundred times as large as the others in many
models, so that a mean over tokens is mostly about it. SAEs still stand in for activations there.
"""

from typing import TYPE_CHECKING, Self

from pydantic import NonNegativeInt, model_validator

from sparsify.settings.base_config import BaseConfig, UserError

if TYPE_CHECKING:
    from torch import Tensor


class IgnoredTokens(BaseConfig):
    """Tokens that losses and metrics leave out."""

    bos: bool = False
    """Whether all tokens are left out that are the tokenizer's BOS token."""
    first_n: NonNegativeInt = 0
    """How many of the first positions of each sequence are left out."""

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

    def kept(self, tokens: "Tensor", bos_token: int | None) -> "Tensor":
        """Which of the tokens, of shape `batch pos`, count."""
        import torch

        kept = torch.ones_like(tokens, dtype=torch.bool)
        kept[:, : self.first_n] = False
        return kept & (tokens != bos_token) if self.bos else kept
