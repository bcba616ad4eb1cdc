"""Tables for the claims of Braun et al. 2024, and of what came after, from finished runs.

Every number is a mean over seeds, or over pairs of runs, and the standard deviation of a sample.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from statistics import mean
from typing import Any

from sparsify.evaluation.frontier import Curves, read_all, spread
from sparsify.runs.run_folder import CONFIG_FILE, EVALUATION_FILE, RESULT_FILE
from sparsify.scripts.cli import read_sae_run
from sparsify.scripts.results.frontier import MIXES, point_of
from sparsify.scripts.tables import markdown_table
from sparsify.settings.base_config import read_yaml

CE_INCREASE = 0.25
"""CE increase at which the runs of all mixes are compared."""

FINETUNE_SEED = 100
"""Added to the seed of a finetune, so that it does not begin with the batches of its start."""

Chosen = dict[str, list[Path]]
"""Run folders by mix, in the order of their seeds."""


def at_same_ce(runs: Sequence[Path]) -> Chosen:
    """Return of each mix the runs with the coefficient that comes closest to `CE_INCREASE`.

    Only coefficients count whose runs are finished with all seeds that any has.
    """
    found: dict[str, dict[float, dict[int, tuple[float, Path]]]] = {}
    for run in runs:
        config = read_sae_run(run)
        if (point := point_of(config.mix, config, run)) is not None:
            by_seed = found.setdefault(point.mix, {}).setdefault(point.coeff, {})
            by_seed[point.seed] = point.ce_increase, run
    seeds = {
        seed for by_coeff in found.values() for by_seed in by_coeff.values() for seed in by_seed
    }

    def distance(by_seed: dict[int, tuple[float, Path]]) -> float:
        return abs(mean(ce_increase for ce_increase, _ in by_seed.values()) - CE_INCREASE)

    chosen: Chosen = {}
    for mix in MIXES:
        whole = [by_seed for by_seed in found.get(mix, {}).values() if set(by_seed) == seeds]
        if whole:
            nearest = min(whole, key=distance)
            chosen[mix] = [nearest[seed][1] for seed in sorted(seeds)]
    return chosen


def are_compared(runs: Sequence[Path], similarities: Path) -> bool:
    """Return whether runs are evaluated on all their text, and all pairs of them compared."""
    if not similarities.exists() or not all(map(is_evaluated, runs)):
        return False
    pairs = json.loads(similarities.read_text(encoding="utf-8"))
    return [(pair["a"], pair["b"]) for pair in pairs] == [
        (checkpoint_name(a), checkpoint_name(b)) for a, b in combinations(runs, 2)
    ]


def is_evaluated(run: Path) -> bool:
    """Return whether `run_evaluate.py` has evaluated a run on the text that training did."""
    if not (run / EVALUATION_FILE).exists():
        return False
    found, of_training = _content(run / EVALUATION_FILE), _content(run / RESULT_FILE)
    return found["n_samples"] == of_training["n_samples"]


def evaluation_table(chosen: Chosen) -> list[str]:
    """Table of what tells the mixes apart where they cost the model the same."""
    metrics = {
        "CE increase": "performance/eval/ce_loss_increase",
        "KL": "loss/eval/logits_kl",
        "L0": "sparsity/eval/L_0",
        "alive": "sparsity/alive_dict_elements",
        "expl. var.": "loss/eval/out_to_in/explained_variance_ratio_of_sums",
        "L2 ratio, first": "loss/eval/out_to_in/l2_ratio_first",
        "L2 ratio, rest": "loss/eval/out_to_in/l2_ratio_rest",
        "nearest cosine": "dictionary/nearest_cosine_alive",
        "KL ÷ random": "performance/eval/error_kl_ratio",
    }
    rows = [
        [
            mix,
            str(read_yaml(runs[0] / CONFIG_FILE)["loss"]["sparsity"]["coeff"]),
            *(_spread_of(runs, _named(metric)) for metric in metrics.values()),
            str(len(runs)),
        ]
        for mix, runs in chosen.items()
    ]
    return markdown_table(["mix", "coeff", *metrics, "seeds"], rows)


def downstream_table(chosen: Chosen) -> list[str]:
    """Error of later activations: mean square, and share of the variance explained."""
    first = next(iter(chosen.values()))[0]
    prefix = "loss/eval/in_to_orig/blocks."
    hooks = [
        name.removeprefix("loss/eval/in_to_orig/")
        for name in _evaluation(first)["metrics"]
        if name.startswith(prefix)
    ]
    rows = [
        [
            mix,
            *(
                f"{_spread_of(runs, _exactly(f'loss/eval/in_to_orig/{hook}'))} "
                f"({_spread_of(runs, _exactly(f'loss/eval/in_to_orig/explained_variance/{hook}'))})"
                for hook in hooks
            ),
        ]
        for mix, runs in chosen.items()
    ]
    return markdown_table(["mix", *hooks], rows)


def geometry_table(chosen: Chosen, similarities: Path) -> list[str]:
    """Table of how similar the alive elements of two runs are, across seeds and across mixes.

    Runs of one seed begin with the same SAE and see the same batches, so they are not compared.
    """
    pairs = {
        (pair["a"], pair["b"]): pair["metrics"]
        for pair in json.loads(similarities.read_text(encoding="utf-8"))
    }
    rows = []
    for mix, runs in chosen.items():
        rows.append([f"{mix}, two seeds", *_similarity(pairs, [*combinations(runs, 2)])])
    for (mix_a, runs_a), (mix_b, runs_b) in combinations(chosen.items(), 2):
        of_two_seeds = [
            (a, b) for (i, a), (j, b) in product(enumerate(runs_a), enumerate(runs_b)) if i != j
        ]
        rows.append([f"{mix_a} and {mix_b}", *_similarity(pairs, of_two_seeds)])
    header = [
        "runs",
        "nearest cosine",
        "nearest above 0.9",
        "and back",
        "matched cosine",
        "matched above 0.9",
        "pairs",
    ]
    return markdown_table(header, rows)


def _similarity(
    pairs: Mapping[tuple[str, str], dict[str, float]], of: Sequence[tuple[Path, Path]]
) -> list[str]:
    found = [pairs[checkpoint_name(a), checkpoint_name(b)] for a, b in of]
    names = (
        "nearest_cosine/a_to_b",
        "nearest_share_above_0.9/a_to_b",
        "nearest_share_above_0.9/b_to_a",
        "matched_cosine",
        "matched_share_above_0.9",
    )
    return [
        *(str(spread([metrics[name] for metrics in found])) for name in names),
        str(len(found)),
    ]


def finetune_table(runs: Mapping[str, Sequence[Path]]) -> list[str]:
    """Return the CE increase of TopK SAEs, trained in three ways on equally many tokens.

    Args:
        runs: Finished runs by the name of their sweep.
    """
    arms = {"local": "topk_local", "local, then finetuned": "finetune", "e2e": "topk_e2e"}
    found: dict[int, Curves] = {}
    for arm, sweep in arms.items():
        for run in runs[sweep]:
            if (point := point_of(arm, read_sae_run(run), run)) is not None:
                seeds = found.setdefault(int(point.coeff), {}).setdefault(arm, {})
                seeds[point.seed % FINETUNE_SEED] = [point]
    rows = []
    for k, curves in sorted(found.items()):
        values = read_all(curves, lambda curve: curve[0].ce_increase)
        if set(values) == set(arms) and all(values.values()):
            n_seeds = str(len(values["local"]))
            rows.append([str(k), *(str(spread(values[arm])) for arm in arms), n_seeds])
    return markdown_table(["k", *arms, "seeds"], rows)


def checkpoint_name(run: Path) -> str:
    """Name that `run_evaluate.py` gives the newest checkpoint of a run."""
    from sparsify.runs.weight_files import checkpoint_at

    return str(checkpoint_at(run))


def _evaluation(run: Path) -> dict[str, Any]:
    return _content(run / EVALUATION_FILE)


def _content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _spread_of(runs: Sequence[Path], read: Callable[[dict[str, float]], float]) -> str:
    return str(spread([read(_evaluation(run)["metrics"]) for run in runs]))


def _exactly(name: str) -> Callable[[dict[str, float]], float]:
    return lambda metrics: metrics[name]


def _named(name: str) -> Callable[[dict[str, float]], float]:
    """Reads a metric of the model, or that of its only SAE."""

    def read(metrics: dict[str, float]) -> float:
        (found,) = [
            value for key, value in metrics.items() if key == name or key.startswith(f"{name}/")
        ]
        return found

    return read
