"""What `--dry-run` checks before training, as a table of facts and of what to change.

A script lists its checks and hands them to `run_checks`. Each is a function that returns what it
found, or raises the `UserError` that training would end with. Here are the checks that all scripts
share, but for those of `memory.py` and `disk.py`; to add one, write such a function and a line in a
script's list.
"""

import netrc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sparsify.data.config import DataConfig
from sparsify.data.loader import TokenLoader
from sparsify.runs.resume import folder_to_write_to
from sparsify.runs.run_folder import check_save_dir
from sparsify.settings.base_config import UserError
from sparsify.settings.secrets import redact_secrets
from sparsify.training.config import TrainingConfig
from sparsify.training.memory import out_of_memory_message

MAX_COUNT_SECONDS = 20.0
"""For which the samples of data are counted."""


@dataclass(frozen=True)
class Check:
    """A line of the table.

    Attributes:
        name: What is checked: a setting, or a part of the run.
        run: Returns what was found, in a line. Raises a `UserError` that says what to change.
        needs: Names of the checks on whose success it builds.
    """

    name: str
    run: Callable[[], str]
    needs: tuple[str, ...] = ()


def run_checks(checks: Sequence[Check]) -> bool:
    """Run checks in their order, and print a line for each as soon as it is known.

    One that fails keeps only those that need it from being done, so that all that is to be changed
    is seen at once.

    Returns:
        Whether all are well.
    """
    width = max(len(check.name) for check in checks)
    passed: set[str] = set()
    n_failed = 0
    for check in checks:
        missing = [name for name in check.needs if name not in passed]
        mark, text = ("–", f"needs {', '.join(missing)}") if missing else _outcome(check)
        if mark == "✓":
            passed.add(check.name)
        n_failed += mark == "✗"
        lines = text.replace("\n", "\n" + " " * (width + 4))
        print(f"{mark} {check.name:<{width}}  {lines}", flush=True)
    n_left_out = len(checks) - len(passed) - n_failed
    left_out = f", {n_left_out} could not be checked" if n_left_out else ""
    print(f"{n_failed} to change{left_out}" if n_failed else "all is well, nothing was trained")
    return n_failed == 0


def _outcome(check: Check) -> tuple[str, str]:
    try:
        return "✓", check.run()
    except UserError as error:
        return "✗", redact_secrets(str(error))
    except RuntimeError as error:
        if (message := out_of_memory_message(error)) is None:
            raise
        return "✗", message


def common_checks(config: TrainingConfig) -> list[Check]:
    """Those that need nothing but the config, and come first in every script."""
    return [
        Check("config", lambda: describe_length(config)),
        Check("save_dir", lambda: check_folder(config)),
        Check("wandb", lambda: check_wandb(config)),
    ]


def describe_length(config: TrainingConfig) -> str:
    """How long the run is. A config that is not valid has been refused before."""
    return (
        f"valid; {config.n_batches * config.batch_size:,} samples in {config.n_steps:,} optimizer "
        f"steps of {config.samples_per_step}"
    )


def check_folder(config: TrainingConfig) -> str:
    """See that the run can write its files."""
    if (folder := folder_to_write_to(config)) is None:
        return "null: the run writes no files"
    check_save_dir(folder)
    return f"{folder}: can be written"


def check_wandb(config: TrainingConfig) -> str:
    """See that a run of Weights & Biases has a key, without contacting the service.

    Raises:
        UserError: Neither the environment nor netrc has one, and it is not to work offline.
    """
    if config.wandb_project is None:
        return "no wandb_project, so nothing is sent"
    mode = os.environ.get("WANDB_MODE", "online")
    if mode in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE={mode}: nothing is sent"
    variables = [v for v in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE") if os.environ.get(v)]
    if found := variables or _wandb_hosts_in_netrc():
        return f"{config.wandb_project}: a key is in {found[0]}; it has not been tried"
    raise UserError(
        f"wandb_project: '{config.wandb_project}' needs a key, and there is none; set "
        "WANDB_API_KEY in .env, or WANDB_MODE=offline, or wandb_project to null"
    )


def _wandb_hosts_in_netrc() -> list[str]:
    """Where `wandb login` has left a key, as `netrc for HOST`."""
    own = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    path = os.environ.get("NETRC")
    with suppress(OSError, netrc.NetrcParseError):
        hosts = netrc.netrc(Path(path).expanduser() if path else None).hosts
        # A login to the public service may be kept under either of its names.
        names = [own.split("://")[-1].rstrip("/"), "api.wandb.ai", "api.forge.coreweave.com"]
        return [f"netrc for {name}" for name in names if name in hosts]
    return []


def check_long_enough(data: DataConfig, loader: TokenLoader, n_samples: int) -> str:
    """See that training data last for `n_samples`, by counting until they do.

    What takes longer than `MAX_COUNT_SECONDS` to count is not refused.

    Raises:
        UserError: They do not.
    """
    name = f"{data.dataset_name} {data.split}"
    if data.n_epochs is None:
        return f"{name}: repeated without end (n_epochs: null), n_samples {n_samples:,}"
    n_wanted = -(-n_samples // data.n_epochs)
    n_found, end = 0, time.monotonic() + MAX_COUNT_SECONDS
    times = f" in {data.n_epochs} epochs" if data.n_epochs > 1 else ""
    for n_of_chunk in loader.samples_by_chunk():
        n_found += n_of_chunk
        found = f"{name}: at least {n_found * data.n_epochs:,} samples of {data.n_ctx} tokens"
        if n_found >= n_wanted:
            return f"{found}{times}, n_samples {n_samples:,}"
        if time.monotonic() > end:
            counted = f"(counted for {MAX_COUNT_SECONDS:.0f} s)"
            return f"{found}{times} {counted}, n_samples {n_samples:,}"
    n_epochs = -(-n_samples // max(1, n_found))
    raise UserError(
        f"train_data: '{name}' holds {n_found * data.n_epochs:,} samples of {data.n_ctx} tokens"
        f"{times}, less than n_samples ({n_samples:,}); set train_data.n_epochs to {n_epochs} or "
        "to null, give more data, or lower n_samples"
    )


def time_steps(step: Callable[[], float], config: TrainingConfig, n_samples_done: int) -> str:
    """Take two steps, of which the first is slower, and say what the second means for the run.

    Args:
        step: A batch forward and backward; returns the loss, and waits until it is known.
        config: How many batches the run has.
        n_samples_done: Samples trained on before, in a run that goes on.
    """
    n_batches = config.n_batches - n_samples_done // config.batch_size
    start = time.monotonic()
    step()
    middle = time.monotonic()
    loss = step()
    end = time.monotonic()
    first, second = middle - start, end - middle
    return (
        f"loss {loss:.4g}; forward and backward {second:.3g} s (the first time {first:.3g} s), so "
        f"about {_duration(n_batches * second)} for {n_batches:,} batches, besides optimizer, "
        "evaluations and checkpoints"
    )


def _duration(seconds: float) -> str:
    """In the largest unit of which there is at least one."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
