"""Train with all combinations of some settings.

    python sparsify/scripts/sweep/run_sweep.py SWEEP.yaml [...] [--processes N]

`sparsify/sweeps/sweep.py` says what a sweep file holds; `wandb sweep SWEEP.yaml` takes it too. Runs
that are done are not run again, and one that was interrupted is resumed: whatever has ended the
command, type it again. If a run fails the others continue, and the exit code is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsify.scripts.cli import exit_code_of, training_scripts
from sparsify.settings.command_line import program_name
from sparsify.sweeps.processes import add_processes_option, do_jobs
from sparsify.sweeps.sweep import load_sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv`, None for the process's arguments; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program_name(), description=str(__doc__).splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP.yaml")
    add_processes_option(parser)
    options = parser.parse_args(argv)
    return exit_code_of(lambda: sweep(options.sweeps, options.processes))


def sweep(paths: Sequence[Path], n_processes: int | None) -> int:
    """Do all runs of some sweeps; returns the exit code: 1 if one failed."""
    scripts = training_scripts().values()
    return do_jobs([job for path in paths for job in load_sweep(path, scripts)], n_processes)


if __name__ == "__main__":
    sys.exit(main())
