"""Settings of an `SAETransformer`: which model, and which SAEs in it."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, field_validator, model_validator

from sparsify.base_config import BaseConfig, Name, PositiveFinite, listed
from sparsify.saes.config import ReLUSAEConfig, SAEConfig


class SAEsConfig(BaseConfig):
    """Where SAEs sit, how large they are, and what they start from."""

    sae_positions: Annotated[list[str], BeforeValidator(listed)]
    """Hook points: full names, or runs of their dotted parts (`hook_resid_pre` is that of every
    block, `blocks.1` never means block 10)."""
    dict_size_to_input_ratio: PositiveFinite
    """Dictionary elements per dimension of the activation."""
    pretrained_sae_paths: Annotated[list[Path] | None, BeforeValidator(listed)] = None
    """Checkpoints whose SAEs to start from. null: all SAEs are new."""
    retrain_saes: bool = False
    """Whether SAEs from pretrained_sae_paths are trained on. If not, they stay as they are."""

    @field_validator("sae_positions")
    @classmethod
    def _positions_are_distinct(cls, positions: list[str]) -> list[str]:
        if not positions:
            raise ValueError("names no hook point; give at least one")
        if repeated := sorted({name for name in positions if positions.count(name) > 1}):
            raise ValueError(f"{', '.join(map(repr, repeated))} is repeated; name it once")
        return positions

    @model_validator(mode="after")
    def _retraining_has_something_to_retrain(self) -> Self:
        if self.retrain_saes and not self.pretrained_sae_paths:
            raise ValueError(
                "retrain_saes is true, but there are no pretrained_sae_paths; name some"
            )
        return self

    @property
    def sae(self) -> SAEConfig:
        """Config of each SAE."""
        return ReLUSAEConfig(dict_size_to_input_ratio=self.dict_size_to_input_ratio)


class SAETransformerConfig(BaseConfig):
    """The settings of a run from which its `SAETransformer` can be built again."""

    tlens_model_name: Name | None = None
    """`tiny-python` (bundled, needs no network) or a model that TransformerLens knows."""
    tlens_model_path: Path | None = None
    """The model/ folder of a train_tlens run, in place of tlens_model_name."""
    tlens_model_processing: Literal["folded", "raw"] = "folded"
    """folded: layer norms folded into the weights and the weights centred, as TransformerLens does
    by default. raw: weights as they are. The activations differ."""
    trust_remote_code: bool = False
    """Whether Python code that comes with tlens_model_name on the hub may be executed."""
    saes: SAEsConfig

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
