"""Compare what mixes of losses need to come equally far, over the runs of sweeps.

    python sparsify/scripts/results/run_frontier.py SWEEP.yaml [...] [--to FOLDER]

Reads the finished runs of the sweeps, which `run_sweep.py` makes. Prints tables, and writes
`frontier.json` (mean L0 of each mix at the same CE increase) and `frontier.png` to the folder.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsify.base_config import UserError
from sparsify.cli import exit_code_of
from sparsify.evaluation.frontier import curves
from sparsify.scripts.results.frontier import (
    frontier_rows,
    frontier_tables,
    plot_frontier,
    points_of,
)
from sparsify.scripts.train_tlens_saes.sweep import load_sweep
from sparsify.training.run_folder import check_save_dir, write_text


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
    check_save_dir(folder)
    jobs = [job for path in paths for job in load_sweep(path)]
    points = points_of(jobs)
    if not points:
        names = " ".join(map(str, paths))
        raise UserError(f"{names}: none of {len(jobs)} runs is finished; do them with run_sweep.py")
    found = curves(points)
    print(f"{len(points)} of {len(jobs)} runs are finished\n")
    print("\n".join(frontier_tables(found)))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "frontier.json", json.dumps(frontier_rows(found), indent=1) + "\n")
    plot_frontier(found, folder / "frontier.png")
    print(f"\nwritten to {folder / 'frontier.json'} and {folder / 'frontier.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
