"""Tables for the claims of Braun et al. 2024, and of what came after, from finished runs.

Every number is a mean over seeds and its standard deviation.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from statistics import mean
from typing import Any

from sparsify.evaluation.frontier import Point, spread
from sparsify.scripts.results.frontier import MIXES, point_of
from sparsify.scripts.tables import markdown_table
from sparsify.scripts.train_tlens_saes.jobs import Job, known_runs

CE_INCREASE = 0.3
"""Where the runs of all mixes are compared."""

EVALUATION_FILE = "evaluation.json"
Chosen = dict[str, list[Path]]
"""Run folders by mix, in the order of their seeds."""


def at_same_ce(jobs: Sequence[Job]) -> Chosen:
    """Of each mix the runs with the coefficient that comes closest to `CE_INCREASE`."""
    known = known_runs(jobs)
    runs: dict[str, dict[float, list[tuple[Point, Path]]]] = {}
    for job in jobs:
        if (run := known.finished(job)) is not None:
            point = point_of(job.config, run)
            runs.setdefault(point.mix, {}).setdefault(point.coeff, []).append((point, run))

    def distance(found: list[tuple[Point, Path]]) -> float:
        return abs(mean(point.ce_increase for point, _ in found) - CE_INCREASE)

    chosen = {mix: min(by_coeff.values(), key=distance) for mix, by_coeff in runs.items()}
    return {
        mix: [run for _, run in sorted(chosen[mix], key=lambda pair: pair[0].seed)]
        for mix in MIXES
        if mix in chosen
    }


def are_compared(runs: Sequence[Path], similarities: Path) -> bool:
    """Whether runs have been evaluated, and all pairs of them compared."""
    if not similarities.exists() or not all((run / EVALUATION_FILE).exists() for run in runs):
        return False
    pairs = json.loads(similarities.read_text(encoding="utf-8"))
    return [(pair["a"], pair["b"]) for pair in pairs] == [
        (checkpoint_name(a), checkpoint_name(b)) for a, b in combinations(runs, 2)
    ]


def evaluation_table(chosen: Chosen) -> list[str]:
    """What tells the mixes apart where they cost the model the same."""
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
        [mix, *(_spread_of(runs, _named(metric)) for metric in metrics.values())]
        for mix, runs in chosen.items()
    ]
    return markdown_table(["mix", *metrics], rows)


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
    """How similar the alive elements of two runs are, across seeds and across mixes."""
    pairs = {
        (pair["a"], pair["b"]): pair["metrics"]
        for pair in json.loads(similarities.read_text(encoding="utf-8"))
    }
    rows = []
    for mix, runs in chosen.items():
        rows.append([f"{mix}, two seeds", *_similarity(pairs, [*combinations(runs, 2)])])
    for (mix_a, runs_a), (mix_b, runs_b) in combinations(chosen.items(), 2):
        rows.append([f"{mix_a} and {mix_b}", *_similarity(pairs, [*product(runs_a, runs_b)])])
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


def finetune_table(sweeps: Mapping[str, Sequence[Job]]) -> list[str]:
    """CE increase of TopK SAEs that were trained in three ways on equally many tokens."""
    known = known_runs([job for jobs in sweeps.values() for job in jobs])
    arms = {"local": "topk_local", "local, then finetuned": "finetune", "e2e": "topk_e2e"}
    by_k: dict[int, dict[str, list[Point]]] = {}
    for arm, sweep in arms.items():
        for job in sweeps[sweep]:
            if (run := known.finished(job)) is not None:
                k: int = getattr(job.config.saes, "k", 0)
                by_k.setdefault(k, {}).setdefault(arm, []).append(point_of(job.config, run))
    rows = [
        [
            str(k),
            *(_ce_spread(found.get(arm, [])) for arm in arms),
            str(min(len(found.get(arm, [])) for arm in arms)),
        ]
        for k, found in sorted(by_k.items())
    ]
    return markdown_table(["k", *arms, "seeds"], rows)


def _ce_spread(points: Sequence[Point]) -> str:
    return str(spread([point.ce_increase for point in points])) if points else ""


def checkpoint_name(run: Path) -> str:
    """What `run_evaluate.py` calls the newest checkpoint of a run."""
    from sparsify.training.checkpoints import checkpoint_at

    return str(checkpoint_at(run))


def _evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / EVALUATION_FILE).read_text(encoding="utf-8"))


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
