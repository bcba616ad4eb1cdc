"""Settings of each kind of SAE, and the table of kinds.

A kind is its module, which computes, and its entry here: a config, listed in `KINDS`, that builds
an SAE of the kind and says what the kind allows. Nothing else needs to change. A `build` method
imports the module itself, so that configs load without torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sparsify.saes.scaling_names import InputScaling
from sparsify.settings.base_config import BaseConfig, Count, PositiveFinite, UserError

if TYPE_CHECKING:
    import sparsify.saes.base


class SAEConfig(BaseConfig, ABC):
    """Settings of SAEs of one kind. Class variables say what the kind allows."""

    dict_size_to_input_ratio: PositiveFinite
    """Dictionary elements per dimension of the activation; their product is rounded down."""
    kind: Any  # a literal in each kind, which no other type lets pyright narrow it to
    """Name of the kind. Each kind declares it again, as a literal with a default."""

    code_has_gradient: ClassVar[bool] = True
    """A penalty can make the code sparse: `loss.sparsity` has a meaning."""
    has_pre_acts: ClassVar[bool] = True
    """Elements have pre-activations, from which `loss.aux_k` can revive them: a `LinearSAE`."""
    has_decoder_bias: ClassVar[bool] = True
    """The output has a bias, which `decoder_bias` can set: a `LinearSAE`."""
    has_thresholds: ClassVar[bool] = False
    """Elements have learned thresholds, by which `loss.pre_act` and a penalty of L0 have a
    gradient: a `JumpReLUSAE`."""
    can_read_elsewhere: ClassVar[bool] = False
    """The SAE may read a hook point before the one that it writes, if `read_positions` names it."""
    reads_elsewhere: ClassVar[bool] = False
    """The SAE always does: `read_positions` is required."""

    @property
    def n_active(self) -> int | None:
        """Elements active on a token, or on average, where `k` sets them. None: training does."""
        return getattr(self, "k", None)

    @property
    def element_counts(self) -> dict[str, int | None]:
        """Settings, by name, that may not exceed the number of dictionary elements."""
        return {"k": self.n_active}

    @abstractmethod
    def build(self, d_act: int, n_dict: int, d_out: int | None) -> "sparsify.saes.base.SAE":
        """Return a new SAE, initialised from torch's global random state.

        Called by `build_sae`, which has checked `element_counts`.

        Args:
            d_act: Width of the activation that the SAE reads.
            n_dict: Dictionary elements.
            d_out: Width of the activation that it writes. None: it writes where it reads.

        Raises:
            UserError: The settings do not suit the sizes.
        """


class LinearSAEConfig(SAEConfig, ABC):
    """Settings of the kinds with an affine encoder and decoder.

    Other tools differ in these: an SAE of theirs is a kind with its own values here.
    """

    centred: bool | None = None
    """The decoder's bias is subtracted from what is encoded. null: as the kind's paper does, and
    never where another hook point is read."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """unit: dictionary elements have unit norm. free: they have any, and a sparsity penalty reads
    each entry of the code times the norm of its element (Conerly et al. 2024)."""
    input_scaling: InputScaling = "none"
    """Scaling of each token that is read, undone where it is written back. layer_norm: to mean 0
    and standard deviation 1. constant_norm: to norm sqrt(width)."""
    skip: bool = False
    """A matrix of its own leads directly from what is read to what is written (Paulo et al.
    2025)."""

    can_read_elsewhere: ClassVar[bool] = True


class ReLUSAEConfig(LinearSAEConfig):
    """An SAE with a ReLU and decoder columns of unit norm (Braun et al. 2024)."""

    kind: Literal["relu"] = "relu"

    def build(self, d_act: int, n_dict: int, d_out: int | None) -> "sparsify.saes.base.SAE":
        """Return a `ReLUSAE`."""
        from sparsify.saes.relu import ReLUSAE

        return ReLUSAE(d_act, n_dict, d_out)


class ReLUTiedBiasSAEConfig(LinearSAEConfig):
    """A ReLU SAE that subtracts the decoder's bias first (Bricken et al. 2023)."""

    kind: Literal["relu_tied_bias"] = "relu_tied_bias"

    def build(self, d_act: int, n_dict: int, d_out: int | None) -> "sparsify.saes.base.SAE":
        """Return a `ReLUTiedBiasSAE`."""
        from sparsify.saes.relu_tied_bias import ReLUTiedBiasSAE

        return ReLUTiedBiasSAE(d_act, n_dict, d_out)


class TopKSAEConfig(LinearSAEConfig):
    """Keeps the k largest pre-activations of each token (Gao et al. 2024)."""

    kind: Literal["topk"] = "topk"
    k: Count
    """Elements active on a token."""
    multi_k: Count | None = None
    """Multi-TopK: the code of so many elements is trained too, with an eighth of the weight, so
    that more than k can be used later. null: it is not."""

    @model_validator(mode="after")
    def _multi_k_is_more(self) -> "TopKSAEConfig":
        if self.multi_k is not None and self.multi_k <= self.k:
            raise ValueError(
                f"multi_k ({self.multi_k}) must be above k ({self.k}); the paper takes 4 * k"
            )
        return self

    @property
    def element_counts(self) -> dict[str, int | None]:
        """`k` and `multi_k`."""
        return {"k": self.k, "multi_k": self.multi_k}

    def build(self, d_act: int, n_dict: int, d_out: int | None) -> "sparsify.saes.base.SAE":
        """Return a `TopKSAE`."""
        from sparsify.saes.topk import TopKSAE

        return TopKSAE(d_act, n_dict, self.k, self.multi_k, d_out=d_out)


class BatchTopKSAEConfig(LinearSAEConfig):
    """Keeps the k * tokens largest pre-activations of a batch (Bussmann et al. 2024)."""

    kind: Literal["batch_topk"] = "batch_topk"
    k: Count
    """Elements active on a token, on average over a batch."""

    def build(self, d_act: int, n_dict: int, d_out: int | None) -> "sparsify.saes.base.SAE":
        """Return a `BatchTopKSAE`."""
        from sparsify.saes.batch_topk import BatchTopKSAE

        return BatchTopKSAE(d_act, n_dict, self.k, d_out)


class GroupMaxSAEConfig(LinearSAEConfig):
    """Keeps the largest pre-activation of each of k groups of elements (EleutherAI's sparsify)."""

    kind: Literal["groupmax"] = "groupmax"
    k: Count
    """Groups, and so elements active on a token at most."""

    def build(self, d_act: int, n_dict: int, d_out: int | None) -> "sparsify.saes.base.SAE":
        """Return a `GroupMaxSAE`, whose groups are of one size."""
        from sparsify.saes.groupmax import GroupMaxSAE

        if n_dict % self.k:
            raise UserError(
                f"saes.k ({self.k}) must divide the number of dictionary elements ({n_dict}), "
                "which it parts into groups; change one of them"
            )
        return GroupMaxSAE(d_act, n_dict, self.k, d_out)


class JumpReLUSAEConfig(LinearSAEConfig):
    """Keeps pre-activations above a learned threshold (Rajamanoharan et al. 2024b)."""

    kind: Literal["jumprelu"] = "jumprelu"
    bandwidth: PositiveFinite
    """Width of the window around a threshold in which pre-activations give it a gradient, in units
    of pre-activations, whose size is that of the activations: the paper's 0.001 is for activations
    scaled to norm 1. Half a standard deviation of pre-activations is a start."""
    initial_threshold: PositiveFinite
    """Threshold of every element at the start, in the same units: about one standard deviation."""

    has_thresholds: ClassVar[bool] = True

    def build(self, d_act: int, n_dict: int, d_out: int | None) -> "sparsify.saes.base.SAE":
        """Return a `JumpReLUSAE`."""
        from sparsify.saes.jumprelu import JumpReLUSAE

        return JumpReLUSAE(d_act, n_dict, self.bandwidth, self.initial_threshold, d_out)


class GatedSAEConfig(LinearSAEConfig):
    """One path decides which elements are active, another how much (Rajamanoharan et al. 2024a)."""

    kind: Literal["gated"] = "gated"

    def build(self, d_act: int, n_dict: int, d_out: int | None) -> "sparsify.saes.base.SAE":
        """Return a `GatedSAE`."""
        from sparsify.saes.gated import GatedSAE

        return GatedSAE(d_act, n_dict, d_out)


PrefixShare = Annotated[float, Field(gt=0, lt=1)]


class MatryoshkaSAEConfig(LinearSAEConfig):
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

    def build(self, d_act: int, n_dict: int, d_out: int | None) -> "sparsify.saes.base.SAE":
        """Return a `MatryoshkaSAE`, whose prefixes must differ in size."""
        from sparsify.saes.matryoshka import MatryoshkaSAE

        sizes = [int(share * n_dict) for share in self.prefix_shares]
        if sizes[0] < 1 or len(set(sizes)) < len(sizes):
            raise UserError(
                f"saes.prefix_shares ({self.prefix_shares}) of {n_dict} dictionary elements "
                f"are {sizes}, which must be above 0 and different; leave some out"
            )
        return MatryoshkaSAE(d_act, n_dict, self.k, sizes, d_out)


class CodebookSAEConfig(SAEConfig):
    """The sum of the k most similar codes (Tamkin et al. 2023)."""

    kind: Literal["codebook"] = "codebook"
    k: Count
    """Codes that are added for a token."""

    code_has_gradient: ClassVar[bool] = False
    has_pre_acts: ClassVar[bool] = False
    has_decoder_bias: ClassVar[bool] = False

    def build(self, d_act: int, n_dict: int, d_out: int | None) -> "sparsify.saes.base.SAE":
        """Return a `CodebookSAE`."""
        from sparsify.saes.codebook import CodebookSAE

        return CodebookSAE(d_act, n_dict, self.k)


class TranscoderConfig(LinearSAEConfig):
    """Reads one hook point and writes another (Dunefsky et al. 2024)."""

    kind: Literal["transcoder"] = "transcoder"
    k: Count | None = None
    """Elements active on a token. null: a ReLU, for a sparsity penalty."""

    reads_elsewhere: ClassVar[bool] = True

    def build(self, d_act: int, n_dict: int, d_out: int | None) -> "sparsify.saes.base.SAE":
        """Return a `Transcoder`."""
        from sparsify.saes.transcoder import Transcoder

        return Transcoder(d_act, n_dict, d_out or d_act, self.k)


KINDS: dict[str, type[SAEConfig]] = {
    config.model_fields["kind"].default: config
    for config in (
        ReLUSAEConfig,
        ReLUTiedBiasSAEConfig,
        TopKSAEConfig,
        BatchTopKSAEConfig,
        GroupMaxSAEConfig,
        JumpReLUSAEConfig,
        GatedSAEConfig,
        MatryoshkaSAEConfig,
        CodebookSAEConfig,
        TranscoderConfig,
    )
}
"""The config of each kind, by name, in the order of `--help`."""


def check_reads(sae: SAEConfig, read_positions: Sequence[str] | None) -> None:
    """See that a kind can read other hook points than it writes, or that it has one to read.

    Raises:
        UserError: It cannot, or has not.
    """
    if sae.reads_elsewhere and not read_positions:
        raise UserError(
            f"saes.read_positions: kind {sae.kind} reads another hook point than it writes; name it"
        )
    if read_positions and not sae.can_read_elsewhere:
        raise UserError(
            f"saes.read_positions: kind {sae.kind} reads where it writes; remove it, or take one "
            f"of {kinds_where(lambda kind: kind.can_read_elsewhere)}"
        )


DEFAULT_KIND = "relu"
"""Kind of a config that names none, as the original's configs do not."""


def kinds_where(allows: Callable[[type[SAEConfig]], bool]) -> str:
    """Names of the kinds that allow something, for a message that refuses it on another."""
    return ", ".join(name for name, config in KINDS.items() if allows(config))
