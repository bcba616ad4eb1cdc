"""Evaluate trained SAEs on the held-out text of their runs, and compare their dictionaries.

    python sparsify/scripts/evaluate/run_evaluate.py RUN_OR_CHECKPOINT ... [--compare FILE.json]

The work is in `evaluate_runs.py`; here only the arguments and the runs' configs are read, so that
help and errors come before torch is loaded.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsify.scripts.cli import exit_code_of
from sparsify.scripts.evaluate.saved_runs import find_runs
from sparsify.settings.base_config import UserError
from sparsify.settings.command_line import Parser
from sparsify.settings.paths import user_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv`, None for the process's arguments; returns the exit code."""

    def work() -> int:
        options = parse(argv)
        check_compare(options.compare, options.runs)
        runs = find_runs(
            options.runs, options.n_samples, options.device, options.trust_remote_code == "true"
        )

        from sparsify.scripts.evaluate.evaluate_runs import evaluate_runs

        evaluate_runs(runs, options.compare)
        return 0

    return exit_code_of(work)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = Parser(
        description="Evaluate trained SAEs on the held-out text of their runs; several on that of "
        "the first, with a table side by side. The result is printed, and written into the run's "
        "folder: evaluation.json, or for a checkpoint evaluation_{N}.json.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=user_path,
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
        "--trust_remote_code",
        choices=("true", "false"),
        default="false",
        help="execute Python code that comes with the runs' models on the hub (false)",
    )
    parser.add_argument(
        "--compare",
        type=user_path,
        metavar="FILE.json",
        help="compare the dictionaries of all pairs of runs too, and write what comes out here",
    )
    options = parser.parse_args(argv)
    if options.n_samples is not None and not 0 < options.n_samples < 2**63:
        raise UserError(
            f"--n_samples: {options.n_samples} is not a number of sequences; set it to 1 or more"
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


if __name__ == "__main__":
    sys.exit(main())
