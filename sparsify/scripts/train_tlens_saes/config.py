"""Settings of `run_train_tlens_saes.py`."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from sparsify.losses.loss import check_loss_suits_kind
from sparsify.runs.config import SAERunConfig
from sparsify.settings.base_config import Count
from sparsify.training.config import DeadElementsConfig, ResamplingConfig

DEFAULT_ACT_FREQUENCY_N_TOKENS = 500_000
MAX_MODEL_NAME = 100
_DATE_AND_TIME = re.compile(r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?$")  # of run folders


class Config(SAERunConfig):
    """SAEs trained inside a frozen language model."""

    decoder_bias: Literal["mean", "geometric_median"] | None = None
    """Start of the decoder's bias: the middle of the activations of the first batch. null: as the
    kind has it."""
    dead_elements: DeadElementsConfig | None = None
    """Rule by which an element counts as dead. null: dead elements are not counted."""
    resampling: ResamplingConfig | None = None
    """Times at which dead elements are reset. null: never."""
    collect_act_frequency_every_n_samples: Count | None = None
    """Samples between two counts of alive dictionary elements. null: no counts in training."""
    act_frequency_n_tokens: Count = DEFAULT_ACT_FREQUENCY_N_TOKENS
    """Training tokens over which one such count runs."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on. auto: a CUDA GPU if torch sees one."""
    mixed_precision: bool | None = None
    """Multiply in bfloat16 in the frozen model, and in TensorFloat-32 in SAEs on a GPU. null: on a
    GPU that has bfloat16. The SAEs' weights and Adam's state stay in float32."""
    compile: bool = False
    """Compile the KL's kernel with torch, some seconds at the start. A CPU needs a C++ compiler, a
    GPU Triton."""

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

    @model_validator(mode="after")
    def _loss_suits_the_kind(self) -> Self:
        check_loss_suits_kind(self.loss, self.saes)
        if self.decoder_bias is not None and not self.saes.has_decoder_bias:
            raise ValueError(
                f"decoder_bias ({self.decoder_bias}): SAEs of kind '{self.saes.kind}' have none; "
                "remove it"
            )
        if self.decoder_bias is not None and self.saes.pretrained_sae_paths:
            raise ValueError(
                f"decoder_bias ({self.decoder_bias}) would overwrite that of pretrained_sae_paths; "
                "remove it"
            )
        return self

    @model_validator(mode="after")
    def _dead_elements_are_counted_if_they_are_used(self) -> Self:
        users = {"resampling": self.resampling}
        users |= {
            f"loss.{name}": term for name, term in self.loss.terms().items() if term.needs_dead
        }
        used_by = [name for name, user in users.items() if user is not None]
        if used_by and self.dead_elements is None:
            raise ValueError(
                f"{used_by[0]} works on dead elements; say when one is dead with "
                "dead_elements.after_n_tokens"
            )
        return self

    @model_validator(mode="after")
    def _changes_come_in_time(self) -> Self:
        for name, term in self.loss.terms().items():
            warmup = term.schedule.warmup_samples if term.schedule else 0
            if warmup >= self.n_samples:
                raise ValueError(
                    f"loss.{name}.schedule.warmup_samples ({warmup}) must be below n_samples "
                    f"({self.n_samples}), or the coefficient never reaches its value"
                )
        warmup = self.loss.sparsity.target_warmup_samples if self.loss.sparsity else 0
        if warmup >= self.n_samples:
            raise ValueError(
                f"loss.sparsity.target_warmup_samples ({warmup}) must be below n_samples "
                f"({self.n_samples}), or target_l0 is never the target"
            )
        n_tokens = self.n_samples * self.train_data.n_ctx
        if self.dead_elements and self.dead_elements.after_n_tokens >= n_tokens:
            raise ValueError(
                f"dead_elements.after_n_tokens ({self.dead_elements.after_n_tokens}) is not below "
                f"the {n_tokens} tokens of the run, so no element is ever dead; lower it"
            )
        every = self.resampling.every_n_samples if self.resampling else 0
        if every > self.n_samples:
            raise ValueError(
                f"resampling.every_n_samples ({every}) is above n_samples ({self.n_samples}), so "
                "there is no resampling; lower it"
            )
        return self

    @property
    def default_run_name(self) -> str:
        """A name made from the settings that matter."""
        path = self.tlens_model_path
        model = short_name(path) if path else str(self.tlens_model_name).replace("/", "-")
        model = model[-MAX_MODEL_NAME:].strip("-")
        sparsity = f"-sparsity-{self.loss.sparsity.coeff:g}" if self.loss.sparsity else ""
        kind = self.mix if self.saes.kind == "relu" else f"{self.saes.kind}-{self.mix}"
        if self.saes.n_active is not None:
            sparsity = f"-k-{self.saes.n_active}{sparsity}"
        return (
            f"{model}-{kind}-ratio-{self.saes.dict_size_to_input_ratio:g}-lr-{self.lr:g}{sparsity}"
        )


def short_name(model_path: Path) -> str:
    """Return the name of a model's folder, or of the run that made it, without its date.

    `out/tlens_2026-11-28_10-22-33/model` is `tlens`, and `models/gpt2` is `gpt2`.
    """
    is_of_run = model_path.name == "model" and model_path.parent.name
    name = model_path.parent.name if is_of_run else model_path.name
    return _DATE_AND_TIME.sub("", name) or "model"
