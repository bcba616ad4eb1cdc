"""Evaluation and comparison of saved runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from torch import Tensor

from sparsify import SAETransformer
from sparsify.evaluation.geometry import DictionarySimilarity, compare_dictionaries
from sparsify.evaluation.suite import evaluate_suite
from sparsify.evaluation.suite_results import Suite
from sparsify.evaluation.suite_table import format_similarities, format_suite
from sparsify.runs.config import SAERunConfig
from sparsify.runs.console import say
from sparsify.runs.run_folder import EVALUATION_FILE, write_text
from sparsify.runs.saved import model_identity
from sparsify.runs.text import kept_tokens, load_eval_batches, seen_in_training
from sparsify.runs.weight_files import WEIGHTS_NAME, checkpoint_at, load_weights
from sparsify.scripts.evaluate.saved_runs import SavedRun
from sparsify.scripts.evaluate.side_by_side import (
    format_side_by_side,
    on_text_of,
    why_on_own_text,
)
from sparsify.settings.base_config import UserError
from sparsify.settings.terminal import report
from sparsify.splicing.sae_dict import position_of
from sparsify.tlens.loading import resolve_device

Pair = tuple[int, int, str]
"""Places of two runs in the list of all, and a hook point where both have an SAE."""


@dataclass(frozen=True)
class EvaluationTarget:
    """One checkpoint of a run, and where its evaluation goes."""

    path: Path
    config: SAERunConfig
    device: str
    result: Path


def evaluate_runs(runs: Sequence[SavedRun], compare_to: Path | None) -> None:
    """Evaluate runs one after the other, on the text of the first; print and write what comes out.

    Args:
        runs: What to evaluate.
        compare_to: Where the comparison of all pairs goes. None: nothing is compared.

    Raises:
        UserError: A run has no checkpoint, or no two can be compared. Nothing has been done then.
    """
    targets = [find_target(run) for run in runs]
    pairs = [] if compare_to is None else comparable_pairs(targets)
    targets = on_one_text(targets)
    dictionaries: list[dict[str, Tensor]] = []
    suites: list[Suite] = []
    for target in targets:
        report(f"{target.path}\n")
        suite, elements = evaluate_checkpoint(target)
        dictionaries.append(elements)
        suites.append(suite)
        content = {"checkpoint": target.path.name} | suite.to_json()
        write_text(target.result, json.dumps(content, indent=1) + "\n")
        report(f"{format_suite(suite)}\n\nwritten to {target.result}\n")
    if len(targets) > 1:
        report(f"{format_side_by_side([str(target.path) for target in targets], suites)}\n")
    if compare_to is not None:
        compare(targets, dictionaries, pairs, compare_to)


def find_target(run: SavedRun) -> EvaluationTarget:
    """The checkpoint that is meant, and where its evaluation goes.

    Raises:
        UserError: There is none.
    """
    path = checkpoint_at(run.path)
    match = WEIGHTS_NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: is not a checkpoint; give a samples_{{N}}.safetensors of the run")
    name = EVALUATION_FILE if run.path.is_dir() else f"evaluation_{match[1]}.json"
    return EvaluationTarget(path, run.config, run.device, path.parent / name)


def on_one_text(targets: Sequence[EvaluationTarget]) -> list[EvaluationTarget]:
    """The targets, to be evaluated on the text of the first, except where that cannot be.

    A warning says which are not, and which have trained on the text.
    """
    first = targets[0]
    found = [first]
    for target in targets[1:]:
        reason = why_on_own_text(first.config, target.config)
        if identity(target) != identity(first):
            reason = "it is of another model"
        if reason is None:
            config = on_text_of(first.config, target.config)
            found.append(replace(target, config=config))
        else:
            say(
                f"warning: {target.path} is evaluated on its own text, not on that of "
                f"{first.path}, as {reason}; what depends on the text cannot be compared"
            )
            found.append(target)
    for target in found:
        if (warning := seen_in_training(target.config)) is not None:
            say(f"warning: {target.path}: {warning}")
    return found


def comparable_pairs(targets: Sequence[EvaluationTarget]) -> list[Pair]:
    """The pairs of dictionaries of the same hook point.

    Raises:
        UserError: There is none, or the SAEs are not all of one model.
    """
    positions: list[list[str]] = []
    first = identity(targets[0])
    for target in targets:
        if identity(target) != first:
            raise UserError(
                f"--compare: {target.path} is of the model {identity(target)}, and "
                f"{targets[0].path} of {first}; compare SAEs of one model"
            )
        keys = dict.fromkeys(name.split(".")[0] for name in load_weights(target.path))
        positions.append([position_of(key) for key in keys])
    pairs = [
        (a, b, position)
        for a, b in combinations(range(len(targets)), 2)
        for position in positions[a]
        if position in positions[b]
    ]
    if not pairs:
        found = "; ".join(", ".join(names) for names in positions)
        raise UserError(
            f"--compare: no two runs have an SAE at the same hook point, but at {found}"
        )
    return pairs


def identity(target: EvaluationTarget) -> tuple[str, str]:
    """Return the model that a checkpoint's SAEs belong to, and how its weights were processed."""
    found = model_identity(target.config)
    return found["tlens_model"], found["tlens_model_processing"]


def evaluate_checkpoint(target: EvaluationTarget) -> tuple[Suite, dict[str, Tensor]]:
    """All that is measured, and the alive elements of each dictionary."""
    config = target.config
    model = SAETransformer.from_local_path(
        target.path,
        resolve_device(target.device),
        trust_remote_code=config.trust_remote_code,
    )
    batches = load_eval_batches(config, model.tlens_model)
    suite = evaluate_suite(model, batches, kept=kept_tokens(config, model.tlens_model))
    elements = {
        position: model.saes.at(position).dict_elements.detach().cpu()[sae.is_alive]
        for position, sae in suite.positions.items()
    }
    return suite, elements


def compare(
    targets: Sequence[EvaluationTarget],
    dictionaries: Sequence[dict[str, Tensor]],
    pairs: Sequence[Pair],
    path: Path,
) -> None:
    """Compare dictionaries; print and write what comes out."""
    similarities: dict[Pair, DictionarySimilarity] = {
        (a, b, position): compare_dictionaries(dictionaries[a][position], dictionaries[b][position])
        for a, b, position in pairs
    }
    names = [str(target.path) for target in targets]
    content = [
        {"a": names[a], "b": names[b], "position": position} | similarity.to_json()
        for (a, b, position), similarity in similarities.items()
    ]
    write_text(path, json.dumps(content, indent=1) + "\n")
    report(f"{format_similarities(names, similarities)}\n\nwritten to {path}")
