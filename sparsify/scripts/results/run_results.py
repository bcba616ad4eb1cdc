"""Everything in docs/results.md: its runs, its tables and its plot.

    python sparsify/scripts/results/run_results.py [--processes N]

What is done is not done again, and a run that was interrupted goes on, so the command can be
repeated after whatever has ended it.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from sparsify.cli import exit_code_of
from sparsify.scripts.evaluate import run_evaluate
from sparsify.scripts.results import claims
from sparsify.scripts.results.frontier import write_frontier
from sparsify.scripts.tables import check_places, put_into
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.scripts.train_tlens_saes.jobs import (
    Job,
    KnownRuns,
    known_runs,
)
from sparsify.scripts.train_tlens_saes.processes import add_processes_option, do_jobs
from sparsify.scripts.train_tlens_saes.sweep import load_sweep
from sparsify.settings.base_config import load_config

FOLDER = Path(__file__).parent
DOCS = FOLDER.parents[2] / "docs"
DOCUMENT, RESULTS = DOCS / "results.md", DOCS / "results"
FRONTIER = ("local", "e2e", "e2e_local", "e2e_downstream")
# On three times the tokens.
LONG = ("long_local", "long_e2e")
TOPK = ("topk_local", "topk_nine_tenths", "topk_e2e")
SECTIONS = ("frontier", "long", "same ce", "downstream", "geometry", "finetune")
FINETUNE = FOLDER / "recipes" / "finetune.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv`, None for the process's arguments; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add_processes_option(parser)
    options = parser.parse_args(argv)
    return exit_code_of(lambda: make_results(options.processes))


def make_results(n_processes: int | None) -> int:
    """Do all that is not done yet; returns the exit code: 1 if a run failed."""
    check_places(DOCUMENT, SECTIONS)
    names = (*FRONTIER, *LONG, *TOPK)
    sweeps = {name: load_sweep(FOLDER / "sweeps" / f"{name}.yaml") for name in names}
    code = do_jobs([*chain(*sweeps.values())], n_processes)
    known = known_runs([*chain(*sweeps.values())])
    sweeps["finetune"] = finetune_jobs(sweeps["topk_nine_tenths"], known)
    if sweeps["finetune"]:
        code |= do_jobs(sweeps["finetune"], n_processes)
    put_into(DOCUMENT, "finetune", claims.finetune_table(sweeps))
    compared = [job for name in FRONTIER for job in sweeps[name]]
    longer = [job for name in LONG for job in sweeps[name]]
    put_into(DOCUMENT, "frontier", write_frontier(compared, RESULTS))
    put_into(DOCUMENT, "long", write_frontier(longer, RESULTS / "long"))
    return code | compare_runs(compared)


def finetune_jobs(starts: Iterable[Job], known: KnownRuns) -> list[Job]:
    """The last tenth of each run whose first nine tenths are done."""
    jobs = []
    for start in starts:
        if (run := known.finished(start)) is None:
            continue
        seed = start.config.seed + claims.FINETUNE_SEED
        k = start.config.saes.n_active
        arguments = [
            str(FINETUNE),
            f"--saes.k={k}",
            f"--seed={seed}",
            f"--saes.pretrained_sae_paths={json.dumps([str(run)])}",
        ]
        config = load_config(Config, arguments, "")
        jobs.append(Job(f"finetune saes.k={k} seed={seed}", arguments, config))
    return jobs


def compare_runs(jobs: Sequence[Job]) -> int:
    """Evaluate the runs of each mix that come closest to the same CE increase, and compare them."""
    chosen = claims.at_same_ce(jobs)
    runs = [run for runs in chosen.values() for run in runs]
    if len(runs) < 2:
        return 0
    similarities = RESULTS / "geometry.json"
    code = 0
    if not claims.are_compared(runs, similarities):
        arguments = [*map(str, runs), "--compare", str(similarities)]
        code = run_evaluate.main(arguments)
    if code == 0:
        put_into(DOCUMENT, "same ce", claims.evaluation_table(chosen))
        put_into(DOCUMENT, "downstream", claims.downstream_table(chosen))
        put_into(DOCUMENT, "geometry", claims.geometry_table(chosen, similarities))
    return code


if __name__ == "__main__":
    sys.exit(main())
