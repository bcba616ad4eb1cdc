"""Several runs on the same text, and their main numbers in one table."""

import math
from collections.abc import Iterator, Sequence

from sparsify.evaluation.suite_results import Suite
from sparsify.evaluation.table import align, number
from sparsify.runs.config import SAERunConfig


def on_text_of(first: SAERunConfig, config: SAERunConfig) -> SAERunConfig:
    """The settings of a run, with the text that those of another are evaluated on."""
    assert first.eval_data is not None, "runs without it have been refused"
    # The order of the text comes from the run's seed where the data have none.
    seed = first.seed if first.eval_data.seed is None else first.eval_data.seed
    return config.model_copy(
        update={
            "eval_data": first.eval_data.model_copy(update={"seed": seed}),
            "eval_n_samples": first.eval_n_samples,
            "batch_size": first.batch_size,  # as whole batches are read
        }
    )


def why_on_own_text(first: SAERunConfig, config: SAERunConfig) -> str | None:
    """Why a run cannot be evaluated as another one. None: it can.

    Whether their models are the same is for the caller to know.
    """
    assert first.eval_data is not None, "runs without it have been refused"
    assert config.eval_data is not None, "runs without it have been refused"
    for name in ("n_ctx", "tokenizer_name", "add_bos_token"):
        theirs, own = getattr(first.eval_data, name), getattr(config.eval_data, name)
        if theirs != own:
            return f"its eval_data.{name} is {own}, not {theirs}"
    if first.ignored_tokens != config.ignored_tokens:
        return "it leaves out other tokens (ignored_tokens)"
    return None


def format_side_by_side(names: Sequence[str], suites: Sequence[Suite]) -> str:
    """The main numbers of several evaluations, a row for each SAE."""
    header = ["run  SAE at", "CE original", "CE increase", "KL", "L0", "alive", "expl. var."]
    rows = [row for place, suite in enumerate(suites, start=1) for row in _rows_of(place, suite)]
    listed = [f"{place:>3}  {name}" for place, name in enumerate(names, start=1)]
    return "\n".join(["side by side", *listed, "", *align([header, *rows])])


def _rows_of(place: int, suite: Suite) -> Iterator[list[str]]:
    evaluation = suite.evaluation
    increase = evaluation.ce_loss - evaluation.ce_loss_raw
    model = [_loss(evaluation.ce_loss_raw), _loss(increase), _loss(evaluation.logits_kl)]
    for position, sae in evaluation.positions.items():
        own = [f"{sae.l0:,.1f}", f"{sae.n_alive:,}", number(sae.explained_variance)]
        yield [f"{place:>3}  {position}", *model, *own]


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "n/a"
