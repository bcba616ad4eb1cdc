"""Dry run: everything that a run opens, and a step, as a table of facts and of what to change.

Each line is a function that returns what it found, or raises the `UserError` that training would
end with. The opening steps are those of the run itself; around them stand the checks that every
kind of run has.
"""

import netrc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from sparsify.runs.bad_batch import check_loss
from sparsify.runs.checkpoints import Checkpoint
from sparsify.runs.disk import check_disk
from sparsify.runs.lifecycle import find_checkpoint
from sparsify.runs.resume import describe_resumption, explained_misfit, folder_to_write_to
from sparsify.runs.run_folder import check_save_dir
from sparsify.runs.training_run import OpeningStep, TrainingRun
from sparsify.runs.wandb_sink import SILENT_MODES, check_wandb_settings
from sparsify.settings.base_config import UserError
from sparsify.settings.secrets import redact_secrets
from sparsify.settings.terminal import can_write, report
from sparsify.training.config import TrainingConfig
from sparsify.training.memory import (
    explained_out_of_memory,
    free_memory,
    in_mb,
    n_bytes,
    out_of_memory_message,
    peak_bytes,
)
from sparsify.training.random_state import set_seed

PLAIN_MARKS = {"✓": "+", "✗": "x", "–": "-"}
"""Marks of the table where the encoding has no others."""


def preflight(run: TrainingRun[Any]) -> bool:  # whatever its batches are
    """Check everything that a run needs, and print what was found; returns whether all is well."""
    config = run.config
    set_seed(config.seed)
    trial = _Trial(run)
    opening = run.opening_steps()
    opened = tuple(step.name for step in opening)
    if config.resume is not None:
        opening = [OpeningStep("resume", trial.check_resume), *opening]
        opened = ("resume", *opened)
    return run_checks(
        [
            OpeningStep("config", lambda: describe_length(config)),
            OpeningStep("save_dir", lambda: check_folder(config)),
            OpeningStep("wandb", lambda: check_wandb(config)),
            *opening,
            OpeningStep("disk", trial.check_disk, needs=("save_dir", run.weights_step)),
            OpeningStep("memory", trial.check_memory, needs=opened),
            OpeningStep("step", trial.check_step, needs=("memory",)),
        ]
    )


def run_checks(checks: Sequence[OpeningStep]) -> bool:
    """Run checks in their order, and print a line for each as soon as it is known.

    One that fails keeps only those that need it from being done, so that everything that is to be
    changed is seen at once.

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
        report(_in_encoding(f"{mark} {check.name:<{width}}  {lines}"))
    n_left_out = len(checks) - len(passed) - n_failed
    left_out = f", {n_left_out} could not be checked" if n_left_out else ""
    report(f"{n_failed} to change{left_out}" if n_failed else "all is well, nothing was trained")
    return n_failed == 0


def _in_encoding(line: str) -> str:
    """Return a line whose mark stdout's encoding has; what follows is up to the stream."""
    return line if can_write(line[0]) else PLAIN_MARKS[line[0]] + line[1:]


def _outcome(check: OpeningStep) -> tuple[str, str]:
    try:
        return "✓", check.run()
    except UserError as error:
        return "✗", redact_secrets(str(error))
    except RuntimeError as error:
        if (message := out_of_memory_message(error)) is None:
            raise
        return "✗", message


class _Trial:
    """The steps that a dry run takes with what was opened."""

    def __init__(self, run: TrainingRun[Any]) -> None:
        self.run = run
        self.checkpoint: Checkpoint | None = None
        self.batch: Any = None  # as the run's kind has it

    def check_resume(self) -> str:
        self.checkpoint = find_checkpoint(self.run)
        self.run.run_dir = self.checkpoint.run_dir
        return describe_resumption(self.run.config, self.checkpoint)

    def check_memory(self) -> str:
        run = self.run
        # Before the state of a resumed run is loaded: at the end of the data none is left.
        self.batch = next(iter(run.loader))
        run.build()
        device = run.stepper.parameters[0].device
        free = free_memory(device)
        learning = 3 * n_bytes(run.stepper.parameters)
        if learning > free:
            self._refuse(f"gradients and the optimizer's state take {in_mb(learning)}", free)
        if self.checkpoint is not None:
            with explained_misfit(self.checkpoint):
                run.resume(self.checkpoint)
        # Each batch is a whole optimizer step here.
        run.stepper.n_accumulation_steps = 1
        with explained_out_of_memory(run.memory_remedies):
            peak = peak_bytes(self.take_step, device)
        if peak > free:  # which a system that swaps lets pass
            self._refuse(f"a step takes {in_mb(peak)}", free)
        return (
            f"{in_mb(peak)} at the peak of a step, with {in_mb(learning)} of gradients and the "
            f"optimizer's state; {in_mb(free)} free before it"
        )

    def _refuse(self, what: str, free: int) -> NoReturn:
        raise UserError(
            f"device: {what}, but {in_mb(free)} are free; lower {self.run.memory_remedies}"
        )

    def check_disk(self) -> str:
        run = self.run
        trained = [p for p in run.trained.parameters() if p.requires_grad]
        n_done = self.checkpoint.n_samples if self.checkpoint else 0
        return check_disk(run.config, run.trained, trained, n_done)

    def check_step(self) -> str:
        with explained_out_of_memory(self.run.memory_remedies):
            return time_steps(self.take_step, self.run.config, self.run.n_samples)

    def take_step(self) -> float:
        """Take an optimizer step on one batch, and wait for its loss."""
        run = self.run
        loss = run.batch_loss(self.batch)
        check_loss(loss, run.tensors_of(self.batch), run.n_samples, None, is_watched=True)
        run.learn_from(loss, self.batch)
        return loss.total.item()


def describe_length(config: TrainingConfig) -> str:
    """Describe the length of the run. A config that is not valid has been refused before."""
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
        UserError: Neither the environment nor netrc has one, and it is not to work offline; or a
            file of the working directory could send it elsewhere.
    """
    if config.wandb_project is None:
        return "no wandb_project, so nothing is sent"
    mode = os.environ.get("WANDB_MODE", "online")
    if mode in SILENT_MODES:
        return f"WANDB_MODE={mode}: nothing is sent"
    check_wandb_settings()
    variables = [v for v in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE") if os.environ.get(v)]
    if found := variables or _wandb_hosts_in_netrc():
        return f"{config.wandb_project}: a key is in {found[0]}; it has not been tried"
    raise UserError(
        f"wandb_project: '{config.wandb_project}' needs a key, and there is none; set "
        "WANDB_API_KEY in .env, or WANDB_MODE=offline, or wandb_project to null"
    )


def _wandb_hosts_in_netrc() -> list[str]:
    """Return the places where `wandb login` has left a key, as `netrc for HOST`."""
    own = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    path = os.environ.get("NETRC")
    with suppress(OSError, netrc.NetrcParseError):
        hosts = netrc.netrc(Path(path).expanduser() if path else None).hosts
        # A login to the public service may be kept under either of its names.
        names = [own.split("://")[-1].rstrip("/"), "api.wandb.ai", "api.forge.coreweave.com"]
        return [f"netrc for {name}" for name in names if name in hosts]
    return []


def time_steps(step: Callable[[], float], config: TrainingConfig, n_samples_done: int) -> str:
    """Take two steps, of which the first may be slower, and say what the second means for the run.

    Args:
        step: Learns from a batch; returns the loss, and waits until it is known.
        config: How many batches the run has.
        n_samples_done: Samples trained on before, in a resumed run.
    """
    n_batches = config.n_batches - n_samples_done // config.batch_size
    loss = step()
    start = time.monotonic()
    step()
    seconds = time.monotonic() - start
    return (
        f"loss {loss:.4g}; a step takes {seconds:.3g} s, so about "
        f"{_duration(n_batches * seconds)} for {n_batches:,} batches, in addition to evaluations "
        "and checkpoints"
    )


def _duration(seconds: float) -> str:
    """In the largest unit of which there is at least one."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
