"""Settings of an `SAETransformer`, and of a run that trained its SAEs."""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    create_model,
    field_validator,
    model_validator,
)

from sparsify.data.config import DataConfig
from sparsify.losses.ignored_tokens import IgnoredTokens
from sparsify.losses.loss import LossConfig
from sparsify.saes.config import DEFAULT_KIND, KINDS, SAEConfig, check_reads
from sparsify.settings.base_config import (
    TAG_MARK,
    BaseConfig,
    Name,
    listed,
    nearest,
)
from sparsify.settings.paths import UserPath
from sparsify.tlens.hook_names import HookNames
from sparsify.training.config import TrainingConfig


class SAEPlacement(BaseConfig):
    """Hook points of SAEs, and the checkpoints that they start from."""

    sae_positions: HookNames
    """Hook points: full names, or runs of their dotted parts (`hook_resid_pre` is that of every
    block, `blocks.1` never means block 10). SAEs write there."""
    read_positions: Annotated[list[str] | None, BeforeValidator(listed)] = None
    """Hook points that SAEs read, in the order of the sae_positions. Two may read the same. null:
    they read where they write; a transcoder never does."""
    pretrained_sae_paths: Annotated[list[UserPath] | None, BeforeValidator(listed)] = None
    """Checkpoints whose SAEs to start from. null: all SAEs are new."""
    retrain_saes: bool = False
    """Train SAEs from pretrained_sae_paths further. false: they stay as they are."""

    @model_validator(mode="after")
    def _retraining_has_something_to_retrain(self) -> Self:
        if self.retrain_saes and not self.pretrained_sae_paths:
            raise ValueError(
                "retrain_saes is true, but there are no pretrained_sae_paths; name some"
            )
        return self

    @classmethod
    def unknown_key_message(cls, key: str) -> str:
        """Say that a setting belongs to other kinds, if it does."""
        others = [name for name, other in PLACED.items() if key in other.model_fields]
        if not others:
            return super().unknown_key_message(key)
        own = cls.model_fields["kind"].default
        return (
            f"'{key}' belongs to kind {', '.join(others)}, not to '{own}'; remove it, or set kind"
        )


def _placed(kind: str, config: type[SAEConfig]) -> "type[SAEsConfig]":
    bases = (config, SAEPlacement)  # fields of the first come last
    name = config.__name__.removesuffix("Config") + "s"
    # Any: what is made of several bases has no type that create_model could declare.
    make: Any = create_model
    return make(name, __base__=bases, __doc__=f"SAEs of kind {kind}.", __module__=__name__)


PLACED = {kind: _placed(kind, config) for kind, config in KINDS.items()}
"""Settings of a run's SAEs, by name of the kind: those of the kind, and where the SAEs sit."""


def _tag(saes: object) -> str:
    is_plain = isinstance(saes, dict)
    kind = saes.get("kind", DEFAULT_KIND) if is_plain else getattr(saes, "kind", DEFAULT_KIND)
    return f"{TAG_MARK}{kind}"


if TYPE_CHECKING:

    class SAEsConfig(SAEConfig, SAEPlacement):
        """SAEs of one kind."""

else:
    SAEsConfig = Annotated[
        reduce(or_, (Annotated[saes, Tag(f"{TAG_MARK}{kind}")] for kind, saes in PLACED.items())),
        Discriminator(_tag),
    ]
    """SAEs of one kind. Where `kind` is missing, as in the original's configs, it is relu."""


class SAETransformerConfig(BaseConfig):
    """The settings of a run from which its `SAETransformer` can be built again."""

    tlens_model_name: Name | None = None
    """`tiny-python` (bundled, needs no network) or a model that TransformerLens knows."""
    tlens_model_path: UserPath | None = None
    """The model/ folder of a train_tlens run, in place of tlens_model_name."""
    tlens_model_processing: Literal["folded", "raw"] = "folded"
    """folded: layer norms folded into the weights and the weights centred, as TransformerLens does
    by default. raw: weights as they are. The activations differ."""
    trust_remote_code: Annotated[bool, Field(exclude=True)] = False
    """Whether Python code that comes with tlens_model_name on the hub may be executed. Only the
    command line can say so, each time: it is neither read from a file nor saved."""
    saes: SAEsConfig
    """SAEs of one kind, and where they sit."""

    @field_validator("saes", mode="before")
    @classmethod
    def _kind_is_known(cls, saes: object) -> object:
        kind = saes.get("kind", DEFAULT_KIND) if isinstance(saes, dict) else DEFAULT_KIND
        if not isinstance(kind, str) or kind not in PLACED:
            raise ValueError(
                f"kind must be one of {', '.join(PLACED)}; there is no {nearest(str(kind), PLACED)}"
            )
        return saes

    @model_validator(mode="after")
    def _read_positions_suit_the_kind(self) -> Self:
        check_reads(self.saes, self.saes.read_positions)
        return self

    @model_validator(mode="after")
    def _there_is_one_model(self) -> Self:
        if (self.tlens_model_name is None) == (self.tlens_model_path is None):
            raise ValueError("give either tlens_model_name or tlens_model_path, and not both")
        if self.trust_remote_code and self.tlens_model_path is not None:
            raise ValueError(
                "trust_remote_code: true has no meaning for tlens_model_path, whose models bring "
                "no code; remove it"
            )
        return self


class SAERunConfig(SAETransformerConfig, TrainingConfig):
    """Settings of a run that trains SAEs, which analysis of the result needs too."""

    loss: LossConfig
    """Terms and their weights."""
    train_data: DataConfig
    """Text that the SAEs are trained on."""
    eval_data: DataConfig | None = None
    """Held-out text. null: no evaluation."""
    ignored_tokens: IgnoredTokens | None = None
    """Tokens that losses and metrics leave out. null: none."""

    @model_validator(mode="after")
    def _some_predictions_count(self) -> Self:
        first_n = self.ignored_tokens.first_n if self.ignored_tokens else 0
        for name, data in (("train_data", self.train_data), ("eval_data", self.eval_data)):
            if data is not None and first_n > 0 and first_n > data.n_ctx - 2:
                raise ValueError(
                    f"ignored_tokens.first_n ({first_n}) leaves no next token to predict in "
                    f"sequences of {data.n_ctx} ({name}.n_ctx); lower it"
                )
        return self

    @property
    def mix(self) -> str:
        """Name of the mix of losses: `local`, or `e2e`, and what else is in the loss.

        `-local` stands for the SAEs' own errors beside the KL, `-downstream` for later errors.
        """
        if not any(term.needs_logits for term in self.loss.terms().values()):
            mix = "local"
        else:
            mix = "e2e" if self.loss.out_to_in is None else "e2e-local"
        return mix if self.loss.in_to_orig is None else f"{mix}-downstream"
