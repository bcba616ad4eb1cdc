"""Settings of `run_train_tlens.py`."""

from typing import Literal, Self

from pydantic import model_validator

from sparsify.data.config import DataConfig
from sparsify.settings.base_config import BaseConfig, Count, PositiveFinite
from sparsify.tlens.architecture import Architecture
from sparsify.training.config import TrainingConfig


class TokenizerConfig(BaseConfig):
    """A byte-level BPE trained on the documents of `train_data`."""

    vocab_size: Count


class Config(TrainingConfig):
    """A language model trained from scratch on text."""

    model: Architecture
    tokenizer: TokenizerConfig | None = None
    """A tokenizer to train. null: the one that train_data.tokenizer_name names."""
    adam_lr: PositiveFinite
    """Learning rate of embeddings, unembedding, biases and norms; lr is that of Muon."""
    train_data: DataConfig
    eval_data: DataConfig
    prompts: list[str] = []
    """Texts that the trained model continues on its card."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on. auto: a CUDA GPU if torch sees one."""

    @property
    def default_run_name(self) -> str:
        """Name that does not depend on the settings."""
        return "tlens"

    @model_validator(mode="after")
    def _there_is_one_tokenizer(self) -> Self:
        if (self.tokenizer is None) == (self.train_data.tokenizer_name is None):
            raise ValueError("give either tokenizer or train_data.tokenizer_name, and not both")
        return self

    @model_validator(mode="after")
    def _the_model_is_kept(self) -> Self:
        if self.save_dir is None:
            raise ValueError("save_dir is null, but the trained model has to be written somewhere")
        return self

    @model_validator(mode="after")
    def _vocabularies_fit(self) -> Self:
        if self.tokenizer is not None and self.tokenizer.vocab_size > self.model.d_vocab:
            raise ValueError(
                f"tokenizer.vocab_size ({self.tokenizer.vocab_size}) is above model.d_vocab "
                f"({self.model.d_vocab}); some ids would have no embedding"
            )
        return self
