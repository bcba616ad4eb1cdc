"""Train every kind of SAE in the bundled model, locally and end to end, and tabulate what came out.

    python sparsify/scripts/train_tlens_saes/run_kinds.py [--processes N] [--recipes NAME ...]

One run for each recipe in kinds/. Those whose run folder holds a result of the same config are not
run again, so an interrupted command can be repeated. The rows go to docs/results/kinds.json and, as
a table, to docs/kinds.md; those of recipes that have not been run here stay as they were.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sparsify.base_config import read_yaml, validate_config
from sparsify.config import PLACED
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.training.run_folder import CONFIG_FILE

FOLDER = Path(__file__).parent
RECIPES = FOLDER / "kinds"
DOCS = FOLDER.parents[2] / "docs"
TABLE_START, TABLE_END = "<!-- table of run_kinds.py -->", "<!-- end of table -->"
MIXES = ("local", "e2e")

Row = dict[str, Any]
"""Names, numbers and counts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done and write the table; returns the exit code: 1 if a run failed."""
    recipes = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"), key=_in_order)}
    parser = argparse.ArgumentParser(description="Train every kind of SAE and compare them.")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--recipes", nargs="*", choices=list(recipes), help="default: all")
    arguments = parser.parse_args(argv)
    chosen = [recipes[name] for name in arguments.recipes or recipes]
    n_threads = max(1, (os.cpu_count() or 1) // arguments.processes)
    with ThreadPoolExecutor(arguments.processes) as pool:
        codes = list(pool.map(lambda path: train(path, n_threads), chosen))
    write([row for path in recipes.values() if (row := result_of(path)) is not None])
    failed = [path.stem for path, code in zip(chosen, codes, strict=True) if code]
    if failed:
        print(f"failed: {', '.join(failed)}; their logs are in the folder of runs", file=sys.stderr)
    return int(bool(failed))


def train(recipe: Path, n_threads: int) -> int:
    """Run a recipe if it has no result yet; returns the exit code."""
    if result_of(recipe) is not None:
        print(f"{recipe.stem}: done before", flush=True)
        return 0
    script = FOLDER / "run_train_tlens_saes.py"
    folder = Path(read_yaml(recipe)["save_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(n_threads)}
    with (folder / f"{recipe.stem}.log").open("w", encoding="utf-8") as log:
        code = subprocess.call(
            [sys.executable, str(script), str(recipe)],
            stdout=log,
            stderr=log,
            env=os.environ | threads,
        )
    print(f"{recipe.stem}: {'done' if code == 0 else f'failed, see {log.name}'}", flush=True)
    return code


def result_of(recipe: Path) -> Row | None:
    """The row of a recipe's newest finished run. None: there is none with its config."""
    config = validate_config(Config, read_yaml(recipe), str(recipe))
    assert config.save_dir is not None
    for folder in sorted(config.save_dir.glob(f"{recipe.stem}_*"), reverse=True):
        done = (folder / CONFIG_FILE).exists() and (folder / "eval.json").exists()
        if done and validate_config(Config, read_yaml(folder / CONFIG_FILE), str(folder)) == config:
            return row_of(config, json.loads((folder / "eval.json").read_text(encoding="utf-8")))
    return None


def row_of(config: Config, evaluation: Row) -> Row:
    """What the table says of a run with one SAE."""
    metrics, (position,) = evaluation["metrics"], evaluation["n_dict"]
    return {
        "kind": config.saes.kind,
        "loss": "local" if config.loss.logits_kl is None else "e2e",
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
    path = DOCS / "results" / "kinds.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    by_run = {(row["kind"], row["loss"]): row for row in [*before, *rows]}
    rows = [by_run[run] for run in sorted(by_run, key=lambda run: _place(*run))]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    document = DOCS / "kinds.md"
    text = document.read_text(encoding="utf-8")
    before, _, rest = text.partition(TABLE_START)
    _, _, after = rest.partition(TABLE_END)
    table = "\n".join(table_lines(rows))
    document.write_text(f"{before}{TABLE_START}\n{table}\n{TABLE_END}{after}", encoding="utf-8")
    print(f"{table}\n\nwritten to {path} and {document}")


def table_lines(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of Markdown."""
    lines = [
        "| kind | loss | CE increase | KL | L0 | alive | expl. var. | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['kind']} | {row['loss']} | {row['ce_loss_increase']:.3f} | {row['kl']:.3f} "
            f"| {row['l0']:.1f} | {row['alive']:,} | {row['explained_variance']:.2f} "
            f"| {row['n_tokens'] / 1e6:.1f}M |"
        )
    return lines


def _in_order(recipe: Path) -> tuple[int, int]:
    kind, _, mix = recipe.stem.rpartition("_")
    return _place(kind, mix)


def _place(kind: str, mix: str) -> tuple[int, int]:
    return list(PLACED).index(kind), MIXES.index(mix)


if __name__ == "__main__":
    sys.exit(main())
