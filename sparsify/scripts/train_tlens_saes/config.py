"""Settings of `run_train_tlens_saes.py`."""

from typing import Literal, Self

from pydantic import model_validator

from sparsify.base_config import Count
from sparsify.config import SAETransformerConfig
from sparsify.data.config import DataConfig
from sparsify.losses import LossConfig
from sparsify.training.config import TrainingConfig

DEFAULT_ACT_FREQUENCY_N_TOKENS = 500_000
MAX_MODEL_NAME = 100


class Config(SAETransformerConfig, TrainingConfig):
    """SAEs trained inside a frozen language model."""

    loss: LossConfig
    """Terms and their weights."""
    train_data: DataConfig
    """What the SAEs are trained on."""
    eval_data: DataConfig | None = None
    """Held-out text. null: no evaluation."""
    collect_act_frequency_every_n_samples: Count | None = None
    """Samples between two counts of alive dictionary elements. null: no counts in training."""
    act_frequency_n_tokens: Count = DEFAULT_ACT_FREQUENCY_N_TOKENS
    """Training tokens over which one such count runs."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train. auto: a GPU if torch sees one."""
    mixed_precision: bool | None = None
    """Whether the frozen model multiplies in bfloat16, and SAEs on a GPU in TensorFloat-32. null:
    on a GPU that has bfloat16. The SAEs' weights and Adam's state stay in float32."""
    compile: bool = False
    """Whether torch compiles the KL's kernel, some seconds at the start; on a CPU this needs a C++
    compiler, on a GPU Triton."""

    @model_validator(mode="after")
    def _evaluations_have_data(self) -> Self:
        if self.eval_data is None and self.eval_every_n_samples is not None:
            raise ValueError(
                f"eval_every_n_samples ({self.eval_every_n_samples}) needs eval_data, which is null"
            )
        return self

    @model_validator(mode="after")
    def _counts_are_taken_if_they_are_set(self) -> Self:
        n_tokens = self.act_frequency_n_tokens
        is_set = n_tokens != DEFAULT_ACT_FREQUENCY_N_TOKENS
        if is_set and self.collect_act_frequency_every_n_samples is None:
            raise ValueError(
                f"act_frequency_n_tokens ({n_tokens}) has no effect while "
                "collect_act_frequency_every_n_samples is null; set that, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _there_is_something_to_compile(self) -> Self:
        if self.compile and self.loss.logits_kl is None:
            raise ValueError(
                "compile: true has no effect without loss.logits_kl, whose kernel it compiles; "
                "remove it"
            )
        return self

    def default_run_name(self) -> str:
        """A name made from the settings that matter."""
        kind = "local"
        if self.loss.logits_kl is not None:
            kind = "e2e"
        if self.loss.in_to_orig is not None:
            kind = f"{kind}-downstream"
        model = str(self.tlens_model_name or self.tlens_model_path).strip("/").replace("/", "-")
        model = model[-MAX_MODEL_NAME:].strip("-")  # the end of a long path tells more
        sparsity = f"-sparsity-{self.loss.sparsity.coeff:g}" if self.loss.sparsity else ""
        return (
            f"{model}-{kind}-ratio-{self.saes.dict_size_to_input_ratio:g}-lr-{self.lr:g}{sparsity}"
        )
