"""Compare what mixes of losses need to come equally far, over finished runs.

    python sparsify/scripts/results/run_frontier.py RUN_FOLDER_OR_SWEEP.yaml [...] [--to FOLDER]

Takes folders of runs, folders that hold such folders, and sweep files, whose finished runs are
found where `run_sweep.py` leaves them. Prints tables, and writes `frontier.json` (mean L0 of each
mix at the same CE increase), `frontier_points.json` (the runs) and `frontier.png`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsify.runs.run_folder import CONFIG_FILE, RESULT_FILE
from sparsify.scripts.cli import exit_code_of, training_scripts
from sparsify.scripts.results.frontier import write_frontier
from sparsify.settings.base_config import UserError
from sparsify.settings.command_line import Parser
from sparsify.settings.paths import user_path
from sparsify.settings.terminal import report
from sparsify.sweeps.jobs import finished_runs
from sparsify.sweeps.sweep import load_sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv`, None for the process's arguments; returns the exit code."""

    def work() -> int:
        options = parse(argv)
        return compare(options.paths, options.to)

    return exit_code_of(work)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "paths",
        nargs="+",
        type=user_path,
        metavar="RUN_FOLDER_OR_SWEEP.yaml",
        help="folder of a run, folder that holds such folders, or sweep file",
    )
    default = Path("out/frontier")
    to_help = f"where to write (default: {default})"
    parser.add_argument("--to", type=user_path, metavar="FOLDER", default=default, help=to_help)
    return parser.parse_args(argv)


def compare(paths: Sequence[Path], folder: Path) -> int:
    """Compare the finished runs at some paths; returns the exit code."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to: '{folder}' is a file; give a folder")
    runs: dict[Path, None] = {}  # each once, in order
    n_missing = 0
    for path in paths:
        found, n_planned = runs_at(path)
        runs |= dict.fromkeys(found)
        n_missing += n_planned - len(found)
    if not runs:
        raise UserError(f"none of {n_missing} runs is finished; do them with run_sweep.py")
    report("\n".join(write_frontier(list(runs), len(runs) + n_missing, folder)))
    report(f"\nwritten to {folder}: frontier.json, frontier_points.json and frontier.png")
    return 0


def runs_at(path: Path) -> tuple[list[Path], int]:
    """Return the finished runs that a folder or a sweep file means, and how many it plans.

    Raises:
        UserError: A folder holds none, or a file is not a valid sweep.
    """
    if not path.is_dir():
        jobs = load_sweep(path, training_scripts().values())
        return finished_runs(jobs), len(jobs)
    folders = [path] if (path / CONFIG_FILE).exists() else sorted(path.iterdir())
    found = [folder for folder in folders if (folder / RESULT_FILE).exists()]
    if not found:
        raise UserError(
            f"{path}: is neither the folder of a finished run, with {CONFIG_FILE} and "
            f"{RESULT_FILE}, nor a folder of such folders; check the path"
        )
    return found, len(found)


if __name__ == "__main__":
    sys.exit(main())
