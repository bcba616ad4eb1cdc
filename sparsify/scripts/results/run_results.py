"""Everything in docs/results.md: its runs, its tables and its plot.

    python sparsify/scripts/results/run_results.py [--processes N]

What is done is not done again, and an interrupted run is resumed, so the command can be
repeated after whatever has ended it.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from sparsify.scripts.cli import exit_code_of, read_sae_run, run_command, training_scripts
from sparsify.scripts.results import claims
from sparsify.scripts.results.frontier import write_frontier
from sparsify.scripts.tables import check_places, put_into
from sparsify.settings.command_line import Parser, load_config
from sparsify.sweeps.jobs import Job, Script, finished_runs
from sparsify.sweeps.processes import add_processes_option, do_jobs
from sparsify.sweeps.sweep import load_sweep

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
    parser = Parser(description=str(__doc__).splitlines()[0])
    add_processes_option(parser)
    return exit_code_of(lambda: make_results(parser.parse_args(argv).processes))


def make_results(n_processes: int | None) -> int:
    """Do all that is not done yet; returns the exit code: 1 if a run failed."""
    check_places(DOCUMENT, SECTIONS)
    names = (*FRONTIER, *LONG, *TOPK)
    script = training_scripts()["train-saes"]
    sweeps = {name: load_sweep(FOLDER / "sweeps" / f"{name}.yaml", [script]) for name in names}
    code = do_jobs([*chain(*sweeps.values())], n_processes)
    sweeps["finetune"] = finetune_jobs(finished_runs(sweeps["topk_nine_tenths"]), script)
    if sweeps["finetune"]:
        code |= do_jobs(sweeps["finetune"], n_processes)
    runs = {name: finished_runs(jobs) for name, jobs in sweeps.items()}
    put_into(DOCUMENT, "finetune", claims.finetune_table(runs))
    for section, group, folder in (
        ("frontier", FRONTIER, RESULTS),
        ("long", LONG, RESULTS / "long"),
    ):
        compared = [run for name in group for run in runs[name]]
        n_planned = sum(len(sweeps[name]) for name in group)
        put_into(DOCUMENT, section, write_frontier(compared, n_planned, folder))
    return code | compare_runs([run for name in FRONTIER for run in runs[name]])


def finetune_jobs(starts: Iterable[Path], script: Script) -> list[Job]:
    """Return the last tenth of each run whose first nine tenths are done."""
    jobs = []
    for run in starts:
        start = read_sae_run(run)
        seed = start.seed + claims.FINETUNE_SEED
        k = start.saes.n_active
        arguments = [
            str(FINETUNE),
            f"--saes.k={k}",
            f"--seed={seed}",
            f"--saes.pretrained_sae_paths={json.dumps([str(run)])}",
        ]
        config = load_config(script.config, arguments, "")
        jobs.append(Job(f"finetune saes.k={k} seed={seed}", script, arguments, config))
    return jobs


def compare_runs(compared: Sequence[Path]) -> int:
    """Evaluate the runs of each mix that come closest to the same CE increase, and compare them."""
    chosen = claims.at_same_ce(compared)
    runs = [run for runs in chosen.values() for run in runs]
    if len(runs) < 2:
        return 0
    similarities = RESULTS / "geometry.json"
    code = 0
    if not claims.are_compared(runs, similarities):
        code = run_command("evaluate", [*map(str, runs), "--compare", str(similarities)])
    if code == 0:
        put_into(DOCUMENT, "same ce", claims.evaluation_table(chosen))
        put_into(DOCUMENT, "downstream", claims.downstream_table(chosen))
        put_into(DOCUMENT, "geometry", claims.geometry_table(chosen, similarities))
    return code


if __name__ == "__main__":
    sys.exit(main())
