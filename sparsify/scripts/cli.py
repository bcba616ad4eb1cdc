"""Parts that all scripts share: reading the config, exit codes, and the `sparsify` command.

Nothing heavy is imported before a config is known to be valid.
"""

import argparse
import errno
import importlib
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sparsify
from sparsify.runs.config import SAERunConfig
from sparsify.runs.run_folder import CONFIG_FILE
from sparsify.settings.base_config import AnyConfig, UserError, nearest, read_yaml, validate_config
from sparsify.settings.command_line import (
    Origin,
    Parser,
    Settings,
    load_config,
    merged,
    named_file,
)
from sparsify.settings.dotenv_file import read_dotenv
from sparsify.settings.secrets import redact_secrets
from sparsify.settings.terminal import MessageFormatter, forgiving_streams, tell
from sparsify.sweeps.jobs import Script
from sparsify.training.config import NEWEST_RUN, TrainingConfig

if TYPE_CHECKING:
    from sparsify.runs.training_run import TrainingRun

EXIT_LOST = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

DRY_RUN = "--dry-run"

DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES),
    # A folder stands where a file is to be.
    *(errno.EISDIR, errno.ENOTDIR, errno.EPERM),
)

COMMANDS = {
    "benchmark": "sparsify.scripts.benchmark.run_benchmark",
    "evaluate": "sparsify.scripts.evaluate.run_evaluate",
    "frontier": "sparsify.scripts.results.run_frontier",
    "sweep": "sparsify.scripts.sweep.run_sweep",
    "train-saes": "sparsify.scripts.train_tlens_saes.run_train_tlens_saes",
    "train-lm": "sparsify.scripts.train_tlens.run_train_tlens",
}
TRAINING = ("train-saes", "train-lm")
"""Commands whose scripts train, of which each has a `Config`."""


def run_script(
    config_class: type[AnyConfig],
    main: Callable[[AnyConfig], None],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    preflight: Callable[[AnyConfig], bool] | None = None,
    origin: Origin = named_file,
) -> int:
    """Run `main`, or with `--dry-run` `preflight`, with the config that the command line gives.

    Args:
        config_class: Class of what `main` takes.
        main: The work. It imports what is heavy itself.
        description: First line of `--help`.
        argv: Arguments without the program's name. None: those of the process.
        preflight: Checks all that `main` needs without doing its work, prints what it found, and
            returns whether all is well. None: there is no `--dry-run`.
        origin: Finds the settings that the options change; see `load_config`.

    Returns:
        Exit code: 0 done, 2 bad input, with its message on stderr (what a dry run finds is on
        stdout), 130 interrupted.
    """

    def work() -> int:
        arguments = sys.argv[1:] if argv is None else argv
        flags = {DRY_RUN: "check everything short of training, say what to change, and exit"}
        config = load_config(
            config_class,
            arguments,
            description,
            flags if preflight else {},
            {"resume": NEWEST_RUN},
            origin,
        )
        if preflight is not None and DRY_RUN in arguments:
            return 0 if preflight(config) else EXIT_BAD_INPUT
        main(config)
        return 0

    return exit_code_of(work)


def train_script(
    config_class: type[TrainingConfig],
    load_run_class: "Callable[[], type[TrainingRun[Any]]]",
    description: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a script that trains; see `run_script`.

    Args:
        config_class: Settings of its runs.
        load_run_class: Imports the kind of run, which is heavy, and returns it.
        description: First line of `--help`.
        argv: Arguments without the program's name. None: those of the process.
    """

    def train(config: TrainingConfig) -> None:
        # Seconds before anything else is known.
        tell(f"{config.run_name}: loading torch and the model ...")
        from sparsify.runs.lifecycle import run_training

        run_training(load_run_class()(config))

    def try_out(config: TrainingConfig) -> bool:
        from sparsify.runs.preflight import preflight

        return preflight(load_run_class()(config, is_trial=True))

    def origin(path: Path | None, content: Settings, options: Settings) -> tuple[Settings, Path]:
        if merged(content, options).get("resume") is None:
            return named_file(path, content, options)
        from sparsify.runs.resume import settings_to_resume_with

        return settings_to_resume_with(config_class, path, content, options)

    return run_script(config_class, train, description, argv, preflight=try_out, origin=origin)


def exit_code_of(work: Callable[[], int]) -> int:
    """Return the exit code of a script's work; failures that a person can fix become messages.

    Those are bad input, a disk that cannot be written, and too little memory: 2. Interrupted: 130.
    A stdout or stderr that cannot be written is none: what matters is in files. Only where help or
    a config was asked for, it is what was to be done: 1.
    """
    with forgiving_streams() as is_stdout_lost:
        let_threads_sleep()
        if logging.lastResort is not None:  # the handler of what no other one takes
            logging.lastResort.setFormatter(MessageFormatter())
        try:
            return _exit_code_of(work)
        except SystemExit:
            sys.stdout.flush()
            if is_stdout_lost():
                return EXIT_LOST
            raise


def _exit_code_of(work: Callable[[], int]) -> int:
    try:
        read_dotenv()
        return work()
    except UserError as error:
        tell(f"error: {redact_secrets(str(error))}")
        return EXIT_BAD_INPUT
    except OSError as error:
        # A full or read-only disk, where nothing better is known than to stop.
        if error.errno not in DISK_ERRORS or error.filename is None:
            raise
        tell(f"error: {error.filename}: cannot be written ({error.strerror})")
        return EXIT_BAD_INPUT
    except RuntimeError as error:
        from sparsify.training.memory import out_of_memory_message

        if (message := out_of_memory_message(error)) is None:
            raise
        tell(f"error: {message}")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as interrupt:
        tell("; ".join(["interrupted", *map(str, interrupt.args)]))
        return EXIT_INTERRUPTED


def let_threads_sleep() -> None:
    """Have torch's threads sleep soon while they wait for each other. Call it before torch loads.

    Beside one other busy process on two cores, a step took 1.7 times as long with the time that
    they spin by default, and alone as long.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def training_scripts() -> dict[str, Script]:
    """Return the scripts that train, by their command."""
    modules = {command: importlib.import_module(COMMANDS[command]) for command in TRAINING}
    return {
        command: Script(Path(str(module.__file__)), module.Config)
        for command, module in modules.items()
    }


def read_sae_run(run_dir: Path) -> SAERunConfig:
    """Return the settings of a run that trained SAEs, from its `final_config.yaml`.

    Raises:
        UserError: There is none, or it is not that of such a run.
    """
    path = run_dir / CONFIG_FILE
    config_class = training_scripts()["train-saes"].config
    config = validate_config(config_class, read_yaml(path), str(path))
    assert isinstance(config, SAERunConfig)
    return config


def run_command(command: str, argv: Sequence[str]) -> int:
    """Run the script of a command with some arguments; returns its exit code."""
    return importlib.import_module(COMMANDS[command]).main(argv)


def main() -> int:
    """Run `sparsify COMMAND` with the arguments of that script; returns the exit code."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in COMMANDS:
        return run_command(command, sys.argv[2:])
    return exit_code_of(lambda: _answer(command))


def _answer(command: str) -> int:
    """Print help or the version, or say that there is no such command."""
    if command.startswith("-"):
        command_parser().parse_args([command])
    # A beginning says more than likeness, by which `train` would mean train-lm alone.
    begun = " or ".join(f"'{name}'" for name in COMMANDS if name.startswith(command))
    guess = f"{command!r}; did you mean {begun}?" if begun else nearest(command, COMMANDS)
    raise UserError(f"there is no command {guess} (see sparsify --help)")


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of `sparsify --help`, with each script's first line, and `--version`."""
    first_lines = {
        command: str(importlib.import_module(module).__doc__).splitlines()[0]
        for command, module in COMMANDS.items()
    }
    commands = [
        textwrap.fill(f"  {command:<12}{line}", subsequent_indent=14 * " ", width=80)
        for command, line in first_lines.items()
    ]
    parser = Parser(
        prog="sparsify",
        usage="sparsify COMMAND ...",
        description=sparsify.__doc__,
        epilog="\n".join(["commands, each with a --help of its own:", *commands]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"sparsify {version('sparsify-e2e')}"
    )
    return parser
