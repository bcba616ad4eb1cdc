"""Where a run was left, and what may not change when it goes on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.base_config import UserError, read_yaml, validate_config
from sparsify.scripts.train_tlens.config import Config
from sparsify.training.checkpoints import load_training_state, load_weights, weights_path
from sparsify.training.run_folder import CONFIG_FILE

KEPT_SETTINGS = (
    "model",
    "tokenizer",
    "train_data",
    "seed",
    "batch_size",
    "effective_batch_size",
    "lr",
    "adam_lr",
)
"""What the saved state holds or depends on: another value would not fit it or have no effect."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights after `n_samples`, and the state of optimizers and data that belongs to them."""

    n_samples: int
    weights: dict[str, Tensor]
    state: dict[str, Any]  # of optimizers and loader, which have no common type


def load_checkpoint(config: Config, run_dir: Path) -> Checkpoint:
    """The newest checkpoint of a run, with which `config` can go on.

    Raises:
        UserError: There is none, or `config` does not suit it.
    """
    if not run_dir.is_dir():
        raise UserError(f"resume: there is no folder '{run_dir}'; give the folder of a run")
    check_settings(config, run_dir / CONFIG_FILE)
    n_samples, state = load_training_state(run_dir)
    if config.n_batches * config.batch_size < n_samples:
        n_least = -(-n_samples // config.samples_per_step) * config.samples_per_step
        raise UserError(
            f"n_samples ({config.n_samples}) must be at least {n_least}, since the run in "
            f"'{run_dir}' has been trained on {n_samples} samples; raise it, or start a new run "
            "without resume"
        )
    # A run that was killed while it saved may have newer weights, without a state.
    return Checkpoint(n_samples, load_weights(weights_path(run_dir, n_samples)), state)


def check_settings(config: Config, path: Path) -> None:
    """See that `config` keeps the settings of the run whose config is at `path`.

    Raises:
        UserError: It does not, or there is no such config.
    """
    before = validate_config(Config, read_yaml(path), str(path)).model_dump(mode="json")
    now = config.model_dump(mode="json")
    changes = [c for name in KEPT_SETTINGS for c in _changes(name, before[name], now[name])]
    if changes:
        raise UserError(
            f"resume: a run goes on with the settings in {path}, but given are "
            f"{', '.join(changes)}; remove the change, or start a new run without resume"
        )


def _changes(name: str, before: object, now: object) -> Iterator[str]:
    """`name` and its values, or those of the settings below it, where they differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            yield from _changes(f"{name}.{key}", before[key], now[key])
    elif before != now:
        yield f"{name}: {json.dumps(now)} instead of {json.dumps(before)}"
