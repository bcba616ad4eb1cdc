"""Train every kind of SAE in the bundled model, locally and end to end, and tabulate what came out.

    python sparsify/scripts/results/run_kinds.py [--processes N] [--recipes NAME ...]

One run for each recipe in train_tlens_saes/kinds/. Those whose run folder holds a result of the
same config are not run again, so an interrupted command can be repeated. The rows go to
docs/results/kinds.json and, as a table, to docs/kinds.md; those of recipes that have not been run
here stay as they were.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparsify.runs.config import PLACED
from sparsify.runs.run_folder import RESULT_FILE, write_text
from sparsify.scripts.cli import exit_code_of, read_sae_run, training_scripts
from sparsify.scripts.tables import check_places, markdown_table, put_into
from sparsify.settings.base_config import read_yaml, validate_config
from sparsify.settings.command_line import Parser
from sparsify.settings.terminal import report
from sparsify.sweeps.jobs import Job, known_runs
from sparsify.sweeps.processes import add_processes_option, do_jobs

FOLDER = Path(__file__).parent
RECIPES = FOLDER.parent / "train_tlens_saes" / "kinds"
DOCS = FOLDER.parents[2] / "docs"
MIXES = ("local", "e2e")

Row = dict[str, Any]
"""Names, numbers and counts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done and write the table; returns the exit code: 1 if a run failed."""

    def work() -> int:
        recipes = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"), key=_in_order)}
        parser = Parser(description="Train every kind of SAE and compare them.")
        parser.add_argument("--recipes", nargs="*", choices=list(recipes), help="default: all")
        add_processes_option(parser)
        options = parser.parse_args(argv)
        chosen = [recipes[name] for name in options.recipes or recipes]
        return run_kinds(recipes.values(), chosen, options.processes)

    return exit_code_of(work)


def run_kinds(recipes: Iterable[Path], chosen: Iterable[Path], n_processes: int | None) -> int:
    """Run what is not done of the chosen recipes; the table is of all that are done."""
    check_places(DOCS / "kinds.md", ["kinds"])
    code = do_jobs([job_of(recipe) for recipe in chosen], n_processes)
    jobs = [job_of(recipe) for recipe in recipes]
    known = known_runs(jobs)
    write([row_of(run) for job in jobs if (run := known.finished(job)) is not None])
    return code


def job_of(recipe: Path) -> Job:
    """The run of a recipe."""
    script = training_scripts()["train-saes"]
    config = validate_config(script.config, read_yaml(recipe), str(recipe))
    return Job(recipe.stem, script, [str(recipe)], config)


def row_of(run: Path) -> Row:
    """Row of the table for a finished run with one SAE."""
    config = read_sae_run(run)
    evaluation: Row = json.loads((run / RESULT_FILE).read_text(encoding="utf-8"))
    metrics, (position,) = evaluation["metrics"], evaluation["n_dict"]
    return {
        "kind": config.saes.kind,
        "loss": config.mix,
        "ce_loss_increase": metrics["performance/eval/ce_loss_increase"],
        "kl": metrics["loss/eval/logits_kl"],
        "l0": metrics[f"sparsity/eval/L_0/{position}"],
        "alive": int(metrics[f"sparsity/alive_dict_elements/{position}"]),
        "explained_variance": metrics[
            f"loss/eval/out_to_in/explained_variance_ratio_of_sums/{position}"
        ],
        "n_tokens": config.n_samples * config.train_data.n_ctx,
        "seed": config.seed,
    }


def write(rows: Sequence[Row]) -> None:
    """Write the rows as JSON, and as a table into the document."""
    path, document = DOCS / "results" / "kinds.json", DOCS / "kinds.md"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    by_run = {(row["kind"], row["loss"]): row for row in [*before, *rows]}
    rows = [by_run[run] for run in sorted(by_run, key=lambda run: _place(*run))]
    write_text(path, json.dumps(rows, indent=1) + "\n")
    table = table_lines(rows)
    put_into(document, "kinds", table)
    report("\n".join([*table, "", f"written to {path} and {document}"]))


def table_lines(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of Markdown."""
    header = ["kind", "loss", "CE increase", "KL", "L0", "alive", "expl. var.", "tokens"]
    return markdown_table(
        header,
        [
            [
                row["kind"],
                row["loss"],
                f"{row['ce_loss_increase']:.3f}",
                f"{row['kl']:.3f}",
                f"{row['l0']:.1f}",
                f"{row['alive']:,}",
                f"{row['explained_variance']:.2f}",
                f"{row['n_tokens'] / 1e6:.1f}M",
            ]
            for row in rows
        ],
    )


def _in_order(recipe: Path) -> tuple[int, int]:
    kind, _, mix = recipe.stem.rpartition("_")
    return _place(kind, mix)


def _place(kind: str, mix: str) -> tuple[int, int]:
    return list(PLACED).index(kind), MIXES.index(mix)


if __name__ == "__main__":
    sys.exit(main())
