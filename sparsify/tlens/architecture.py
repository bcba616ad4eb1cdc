"""The shape of a TransformerLens model that is trained from scratch."""

from typing import Literal, Self

from pydantic import model_validator

from sparsify.settings.base_config import BaseConfig, Count, PositiveFinite


class Architecture(BaseConfig):
    """A decoder-only transformer, in TransformerLens's terms.

    Only what both `HookedTransformer` and the bridge's native model can express, so that one
    weight file serves every TransformerLens version.
    """

    n_layers: Count
    d_model: Count
    n_heads: Count
    d_mlp: Count
    n_ctx: Count
    d_vocab: Count
    act_fn: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    normalization_type: Literal["LN", "RMS"] = "LN"
    positional_embedding_type: Literal["standard", "rotary"] = "rotary"
    eps: PositiveFinite = 1e-5

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads ({self.n_heads}) must divide d_model ({self.d_model}) without remainder"
            )
        if self.positional_embedding_type == "rotary" and self.d_head % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.d_head}")
        return self
