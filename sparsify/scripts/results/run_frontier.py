"""Compare what mixes of losses need to come equally far, over the runs of sweeps.

    python sparsify/scripts/results/run_frontier.py SWEEP.yaml [...] [--to FOLDER]

Reads the finished runs of the sweeps, which `run_sweep.py` makes. Prints tables, and writes
`frontier.json` (mean L0 of each mix at the same CE increase), `frontier_points.json` (the runs) and
`frontier.png` to the folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsify.cli import exit_code_of
from sparsify.scripts.results.frontier import write_frontier
from sparsify.scripts.train_tlens_saes.sweep import load_sweep
from sparsify.settings.base_config import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv`, None for the process's arguments; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP.yaml")
    default = Path("out/frontier")
    to_help = f"where to write (default: {default})"
    parser.add_argument("--to", type=Path, metavar="FOLDER", default=default, help=to_help)
    options = parser.parse_args(argv)
    return exit_code_of(lambda: compare(options.sweeps, options.to))


def compare(paths: Sequence[Path], folder: Path) -> int:
    """Compare the finished runs of some sweeps; returns the exit code."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to: '{folder}' is a file; give a folder")
    jobs = [job for path in paths for job in load_sweep(path)]
    print("\n".join(write_frontier(jobs, folder)))
    print(f"\nwritten to {folder}: frontier.json, frontier_points.json and frontier.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
