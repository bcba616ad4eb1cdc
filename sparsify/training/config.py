"""Settings that every training script shares: how long, how fast, and what is kept of the run."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from sparsify.settings.base_config import BaseConfig, Count, Name, PositiveFinite, Seed, UserError
from sparsify.settings.paths import UserPath

DEFAULT_MIN_LR_FACTOR = 0.1
NEWEST_RUN = "newest"
"""Value of `resume` that means the newest run in save_dir."""
MAX_PROJECT_NAME = 128  # as wandb has it, and what no such name holds
NOT_IN_PROJECT_NAMES = "/\\#?%:"
MAX_RUN_NAME_BYTES = 200  # of the 255 of most file systems; date and time come behind it


class DeadElementsConfig(BaseConfig):
    """Rule by which a dictionary element counts as dead."""

    after_n_tokens: Count
    """Tokens on which an element has not fired when it counts as dead."""
    min_density: float = Field(default=0.0, ge=0, lt=1)
    """An element is dead too if it fired on a smaller share of the last whole stretch of
    after_n_tokens tokens."""


class ResamplingConfig(BaseConfig):
    """Times at which dead elements are reset to read badly reconstructed inputs."""

    every_n_samples: Count
    """Samples between two resamplings."""
    until_n_samples: Count
    """Samples after which there are no more, so that the last new elements have time to learn."""

    @model_validator(mode="after")
    def _there_is_one(self) -> Self:
        if self.until_n_samples < self.every_n_samples:
            raise ValueError(
                f"until_n_samples ({self.until_n_samples}) is below every_n_samples "
                f"({self.every_n_samples}), so there is no resampling; raise it"
            )
        return self


class TrainingConfig(BaseConfig):
    """Settings of one training run. A script's `Config` inherits them and adds its own.

    Everything is counted in samples, which keeps its meaning when the batch size changes.
    """

    n_samples: Count
    """Samples to train on. What is left after the last full effective batch is not used."""
    batch_size: Count
    """Samples in one forward and backward pass."""
    effective_batch_size: Count | None = None
    """Samples in one optimizer step, a multiple of batch_size. null: batch_size."""

    lr: PositiveFinite
    """Learning rate at its highest."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Course of the learning rate after the warmup. cosine: half a cosine down to min_lr_factor.
    linear: constant, then a straight fall over the last cooldown_samples. constant: no fall."""
    min_lr_factor: float = Field(default=DEFAULT_MIN_LR_FACTOR, ge=0, le=1)
    """Lowest learning rate after the warmup, as a fraction of lr."""
    warmup_samples: NonNegativeInt = 0
    """Samples over which the learning rate rises linearly from 0 to lr."""
    cooldown_samples: NonNegativeInt | None = 0
    """Linear schedule only: samples at the end over which the learning rate falls towards 0, but
    not below min_lr_factor. null: from the end of the warmup."""
    max_grad_norm: PositiveFinite | None = None
    """Gradients of a larger total norm are scaled down to it. null: never."""

    log_every_n_grad_steps: Count = 20
    """Optimizer steps between two log lines."""
    eval_every_n_samples: Count | None = None
    """Samples between two evaluations. null: only before and after training."""
    eval_n_samples: Count = 500
    """Held-out samples in one evaluation, or as many as there are, in whole batches."""
    save_every_n_samples: Count | None = None
    """Samples between two checkpoints. null: none for their number."""
    save_every_minutes: PositiveFinite | None = None
    """Minutes between two checkpoints. null: none for the time."""
    keep_last: Count = 2
    """Checkpoints that keep what is needed to resume from them. The weights of all are kept."""
    resume: UserPath | None = None
    """Run folder to resume from its newest checkpoint, or a file of the checkpoint to resume
    from. `newest`, or --resume alone: the newest run in save_dir. null: a new run."""
    save_dir: UserPath | None = Path("out")
    """Folder in which the run makes its own folder. null: the run writes no files."""

    seed: Seed = 0
    """Seed of every random source that has none of its own."""
    wandb_project: Name | None = None
    """Weights & Biases project. null: no tracking service."""
    wandb_run_name: Name | None = None
    """Name of the run, also of its folder. null: made from the settings that matter."""
    wandb_run_name_prefix: str = ""
    """Put before the name of the run."""

    @property
    def samples_per_step(self) -> int:
        """Samples in one optimizer step."""
        return self.effective_batch_size or self.batch_size

    @property
    def n_accumulation_steps(self) -> int:
        """Batches whose gradients are averaged for one optimizer step."""
        return self.samples_per_step // self.batch_size

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.n_samples // self.samples_per_step

    @property
    def n_batches(self) -> int:
        """Batches of the whole run."""
        return self.n_steps * self.n_accumulation_steps

    @property
    def default_run_name(self) -> str:
        """Name of a run to which the config gives none. Each script has its own."""
        return "run"

    @property
    def run_name(self) -> str:
        """The run's name with its prefix."""
        return self.wandb_run_name_prefix + (self.wandb_run_name or self.default_run_name)

    @field_validator("wandb_project")
    @classmethod
    def _project_is_a_name(cls, project: str | None) -> str | None:
        found = [character for character in NOT_IN_PROJECT_NAMES if character in (project or "")]
        if found:
            raise ValueError(
                f"the name of a project holds no {found[0]!r}; give the project alone, and whose "
                "it is as WANDB_ENTITY in .env"
            )
        if project is not None and len(project) > MAX_PROJECT_NAME:
            raise ValueError(f"the name of a project has at most {MAX_PROJECT_NAME} characters")
        return project

    @model_validator(mode="after")
    def _batches_fill_the_effective_batch(self) -> Self:
        if self.samples_per_step % self.batch_size:
            raise ValueError(
                f"effective_batch_size ({self.effective_batch_size}) must be a multiple of "
                f"batch_size ({self.batch_size})"
            )
        return self

    @model_validator(mode="after")
    def _there_is_an_optimizer_step(self) -> Self:
        if self.n_samples < self.samples_per_step:
            raise ValueError(
                f"n_samples ({self.n_samples}) must be at least one effective batch "
                f"({self.samples_per_step}), or no optimizer step is taken"
            )
        return self

    @model_validator(mode="after")
    def _warmup_and_cooldown_fit(self) -> Self:
        if self.warmup_samples >= self.n_samples:
            raise ValueError(
                f"warmup_samples ({self.warmup_samples}) must be below n_samples "
                f"({self.n_samples}), or the full learning rate is never reached"
            )
        if self.warmup_samples + (self.cooldown_samples or 0) > self.n_samples:
            raise ValueError(
                f"warmup_samples ({self.warmup_samples}) and cooldown_samples "
                f"({self.cooldown_samples}) must together be at most n_samples ({self.n_samples})"
            )
        return self

    @model_validator(mode="after")
    def _schedule_uses_what_is_set(self) -> Self:
        if self.lr_schedule == "linear" and self.cooldown_samples == 0:
            raise ValueError(
                "lr_schedule 'linear' falls over the last cooldown_samples (0), so it never falls; "
                "set cooldown_samples to a number, or to null to fall from the end of the warmup, "
                "or set lr_schedule to 'constant'"
            )
        if self.lr_schedule != "linear" and self.cooldown_samples != 0:
            raise ValueError(
                f"cooldown_samples ({self.cooldown_samples}) belongs to lr_schedule 'linear' and "
                f"is not used by '{self.lr_schedule}'; remove it"
            )
        if self.lr_schedule == "constant" and self.min_lr_factor != DEFAULT_MIN_LR_FACTOR:
            raise ValueError(
                f"min_lr_factor ({self.min_lr_factor}) is not used by lr_schedule 'constant'; "
                "remove it"
            )
        return self

    @model_validator(mode="after")
    def _run_name_names_a_folder(self) -> Self:
        check_run_name(self.run_name)
        return self

    @model_validator(mode="after")
    def _saves_have_a_folder(self) -> Self:
        for name in ("save_every_n_samples", "save_every_minutes", "resume"):
            if self.save_dir is None and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name} ({value}) needs a save_dir, which is null; set a folder or remove "
                    f"{name}"
                )
        return self


def check_run_name(run_name: str) -> None:
    """Raise a `UserError` if `run_name` is not the name of a folder."""
    is_name = Path(run_name).name == run_name != ".." and "\\" not in run_name
    is_short = len(run_name.encode()) <= MAX_RUN_NAME_BYTES
    if not (is_name and is_short and run_name.isprintable()):
        rule = "no slash and no line break, nor be dots alone"
        raise UserError(
            f"wandb_run_name: the run's name {run_name!r} also names its folder, so it must have "
            f"{rule if is_short else f'at most {MAX_RUN_NAME_BYTES} bytes'}; change wandb_run_name "
            "or wandb_run_name_prefix"
        )
