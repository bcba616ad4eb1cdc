"""Configs of the SAE kinds. `sparsify.saes.build` turns one into a module.

To add a kind, write its module, its config here and its place in `SAEConfig`, a line in
`sparsify.saes.build`, and what a config of a run says of it in `sparsify.runs.config`.
"""

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from sparsify.settings.base_config import BaseConfig, Count, PositiveFinite


class BaseSAEConfig(BaseConfig):
    """What every kind of SAE has."""

    dict_size_to_input_ratio: PositiveFinite
    """Dictionary elements per dimension of the activation; their product is rounded down."""

    has_pre_acts: ClassVar[bool] = True
    """Whether an element has a pre-activation, from which auxiliary losses can revive it."""
    has_decoder_bias: ClassVar[bool] = True
    """Whether what it writes has a bias."""

    @property
    def n_active(self) -> int | None:
        """Elements active on a token, or on average, where `k` sets them. None: training does."""
        return getattr(self, "k", None)


class ReLUSAEConfig(BaseSAEConfig):
    """An SAE with a ReLU and decoder columns of unit norm (Braun et al. 2024)."""

    kind: Literal["relu"] = "relu"


class ReLUTiedBiasSAEConfig(BaseSAEConfig):
    """A ReLU SAE that subtracts the decoder's bias first (Bricken et al. 2023)."""

    kind: Literal["relu_tied_bias"] = "relu_tied_bias"


class TopKSAEConfig(BaseSAEConfig):
    """Keeps the k largest pre-activations of each token (Gao et al. 2024)."""

    kind: Literal["topk"] = "topk"
    k: Count
    """Elements active on a token."""
    multi_k: Count | None = None
    """Multi-TopK: the code of so many elements is trained too, with an eighth of the weight, so
    that more than k can be used later. null: it is not."""

    @model_validator(mode="after")
    def _multi_k_is_more(self) -> Self:
        if self.multi_k is not None and self.multi_k <= self.k:
            raise ValueError(
                f"multi_k ({self.multi_k}) must be above k ({self.k}); the paper takes 4 * k"
            )
        return self


class BatchTopKSAEConfig(BaseSAEConfig):
    """Keeps the k * tokens largest pre-activations of a batch (Bussmann et al. 2024)."""

    kind: Literal["batch_topk"] = "batch_topk"
    k: Count
    """Elements active on a token, on average over a batch."""


class JumpReLUSAEConfig(BaseSAEConfig):
    """Keeps pre-activations above a learned threshold (Rajamanoharan et al. 2024b)."""

    kind: Literal["jumprelu"] = "jumprelu"
    bandwidth: PositiveFinite
    """Width of the window around a threshold in which pre-activations give it a gradient, in units
    of pre-activations, whose size is that of the activations: the paper's 0.001 is for activations
    scaled to norm 1. Half a standard deviation of pre-activations is a start."""
    initial_threshold: PositiveFinite
    """Threshold of every element at the start, in the same units: about one standard deviation."""


class GatedSAEConfig(BaseSAEConfig):
    """One path decides which elements are active, another how much (Rajamanoharan et al. 2024a)."""

    kind: Literal["gated"] = "gated"


PrefixShare = Annotated[float, Field(gt=0, lt=1)]


class MatryoshkaSAEConfig(BaseSAEConfig):
    """A batch-top-k dictionary whose prefixes are dictionaries too (Bussmann et al. 2025)."""

    kind: Literal["matryoshka"] = "matryoshka"
    k: Count
    """Elements active on a token, on average over a batch, of the whole dictionary."""
    prefix_shares: list[PrefixShare] = Field(
        default=[0.0625, 0.125, 0.25, 0.5], min_length=1, validate_default=True
    )
    """Shares of the dictionary that are trained to do without the rest, ascending."""

    @field_validator("prefix_shares")
    @classmethod
    def _shares_ascend(cls, shares: list[float]) -> list[float]:
        if any(small >= large for small, large in pairwise(shares)):
            raise ValueError("must ascend, each larger than the one before")
        return shares


class CodebookSAEConfig(BaseSAEConfig):
    """The sum of the k most similar codes (Tamkin et al. 2023)."""

    kind: Literal["codebook"] = "codebook"
    k: Count
    """Codes that are added for a token."""
    has_pre_acts: ClassVar[bool] = False
    has_decoder_bias: ClassVar[bool] = False


class TranscoderConfig(BaseSAEConfig):
    """Reads one hook point and writes another (Dunefsky et al. 2024)."""

    kind: Literal["transcoder"] = "transcoder"
    k: Count | None = None
    """Elements active on a token. null: a ReLU, for a sparsity penalty."""
    skip: bool = False
    """Whether a matrix of its own leads directly from what is read to what is written (Paulo et al.
    2025)."""


SAEConfig = (
    ReLUSAEConfig
    | ReLUTiedBiasSAEConfig
    | TopKSAEConfig
    | BatchTopKSAEConfig
    | JumpReLUSAEConfig
    | GatedSAEConfig
    | MatryoshkaSAEConfig
    | CodebookSAEConfig
    | TranscoderConfig
)
