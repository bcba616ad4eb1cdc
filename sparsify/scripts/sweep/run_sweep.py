"""Train all runs of some sweep files, and tabulate the results.

    python sparsify/scripts/sweep/run_sweep.py SWEEP.yaml [...] [--processes N] [--NAME VALUE ...]

`sparsify/sweeps/sweep.py` says what a sweep file holds. Settings of the training script,
such as `--n_samples 800`, may follow and apply to all runs. Runs that are done
are not run again, and one that was interrupted is resumed: whatever has ended the command, type it
again. If a run fails the others continue, and the exit code is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsify.scripts.cli import exit_code_of, training_scripts
from sparsify.settings.command_line import Parser
from sparsify.settings.paths import user_path
from sparsify.sweeps.processes import add_processes_option, do_jobs
from sparsify.sweeps.sweep import load_sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv`, None for the process's arguments; returns the exit code."""

    def work() -> int:
        options, overrides = parse(argv)
        return sweep(options.sweeps, overrides, options.processes)

    return exit_code_of(work)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the command line, and those that are for all runs."""
    parser = Parser(
        description=str(__doc__).splitlines()[0],
        epilog="Further options, such as --n_samples 800, are settings for all runs.",
    )
    parser.add_argument("sweeps", nargs="+", type=user_path, metavar="SWEEP.yaml")
    add_processes_option(parser)
    return parser.parse_known_args(argv)


def sweep(paths: Sequence[Path], overrides: Sequence[str], n_processes: int | None) -> int:
    """Do all runs of some sweeps; returns the exit code: 1 if one failed."""
    scripts = training_scripts().values()
    jobs = [job for path in paths for job in load_sweep(path, scripts, overrides)]
    return do_jobs(jobs, n_processes, has_table=True)


if __name__ == "__main__":
    sys.exit(main())
