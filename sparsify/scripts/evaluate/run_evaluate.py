"""Evaluate trained SAEs on the held-out text of their runs, and compare their dictionaries.

    python sparsify/scripts/evaluate/run_evaluate.py RUN_OR_CHECKPOINT ... [--compare FILE.json]

The work is in `evaluate_runs.py`; here only the arguments and the runs' configs are read, so that
help and errors come before torch is loaded.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify.runs.config import SAERunConfig
from sparsify.runs.run_folder import CONFIG_FILE
from sparsify.scripts.cli import exit_code_of, read_sae_run
from sparsify.settings.base_config import UserError


@dataclass(frozen=True)
class SavedRun:
    """What is to be evaluated."""

    path: Path
    """A run folder, which means its newest checkpoint, or one checkpoint in it."""

    config: SAERunConfig
    """Settings of the run."""

    device: str
    """Where to evaluate it, or auto."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv`, None for the process's arguments; returns the exit code."""

    def work() -> int:
        options = parse(argv)
        check_compare(options.compare, options.runs)
        runs = find_runs(options.runs, options.n_samples, options.device)

        from sparsify.scripts.evaluate.evaluate_runs import evaluate_runs

        evaluate_runs(runs, options.compare)
        return 0

    return exit_code_of(work)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description="Evaluate trained SAEs on the held-out text of their runs. The result is "
        "printed, and written into the run's folder: evaluation.json, or for a checkpoint "
        "evaluation_{N}.json.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="folder of a run, for its newest checkpoint, or one of its samples_{N}.safetensors",
    )
    parser.add_argument(
        "--n_samples",
        type=int,
        metavar="N",
        help="sequences, in whole batches (the run's eval_n_samples)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="where to compute; auto: a CUDA GPU if torch sees one (auto)",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="FILE.json",
        help="compare the dictionaries of all pairs of runs too, and write what comes out here",
    )
    options = parser.parse_args(argv)
    if options.n_samples is not None and not 0 < options.n_samples < 2**63:
        raise UserError(
            f"--n_samples: {options.n_samples} is no number of sequences; set it to 1 or more"
        )
    return options


def check_compare(path: Path | None, runs: Sequence[Path]) -> None:
    """Raise a `UserError` if there is nothing to compare, or `path` is not the name of a file."""
    if path is None:
        return
    if path.suffix != ".json" or os.path.isdir(path):
        raise UserError(f"--compare: '{path}' is not the name of a .json file; give one")
    if not os.path.isdir(path.parent):
        raise UserError(f"--compare: there is no folder '{path.parent}'; make it first")
    if len(runs) < 2:
        raise UserError("--compare: there is one run, and nothing to compare it with; give another")


def find_runs(paths: Sequence[Path], n_samples: int | None, device: str) -> list[SavedRun]:
    """The runs at some paths, to be evaluated on `n_samples` sequences on `device`.

    Args:
        paths: Run folders and checkpoints.
        n_samples: Sequences. None: as many as the run's config says.
        device: As in the config of a run.

    Raises:
        UserError: There is no run at a path, it has no text to be evaluated on, or is named twice.
    """
    runs: dict[Path, SavedRun] = {}
    for path in paths:
        if not os.path.exists(path):  # False where `Path.exists` would raise
            raise UserError(f"{path}: there is no such file or folder; check the path")
        if path.resolve() in runs:
            raise UserError(f"{path}: is given twice; give each run once")
        folder = path if path.is_dir() else path.parent
        if not (folder / CONFIG_FILE).exists():
            raise UserError(
                f"{path}: is no run, as there is no {CONFIG_FILE} in '{folder}'; give the folder "
                "of a run that trained SAEs, or a checkpoint in it"
            )
        config = read_sae_run(folder)
        if config.eval_data is None:
            raise UserError(
                f"{folder / CONFIG_FILE}: has no eval_data, so there is no text to evaluate on; "
                "set it there"
            )
        n_eval = {"eval_n_samples": n_samples or config.eval_n_samples}
        runs[path.resolve()] = SavedRun(path, config.model_copy(update=n_eval), device)
    return list(runs.values())


if __name__ == "__main__":
    sys.exit(main())
