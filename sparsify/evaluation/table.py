"""The result of an evaluation as a table for the terminal."""

import math
from collections.abc import Sequence

from sparsify.evaluation.results import Evaluation, PositionEvaluation

UNDEFINED = "n/a"


def format_table(evaluation: Evaluation) -> str:
    """Two small tables, of the model and of each SAE, and what their columns mean."""
    saes = "SAE" if len(evaluation.positions) == 1 else "SAEs"
    return "\n".join(
        [
            f"Evaluated on {evaluation.n_tokens:,} tokens ({evaluation.n_samples:,} sequences)",
            "",
            *align(_model_rows(evaluation, saes)),
            "",
            f"KL(original || with {saes}): {evaluation.logits_kl:.4f} nats per token",
            f"same most likely next token: {percent(evaluation.top1_agreement)} of tokens",
            "",
            *align([_SAE_HEADER, *(_sae_row(*item) for item in evaluation.positions.items())]),
            "",
            "CE loss    cross-entropy of the next token, in nats",
            f"recovered  share of the increase in its line that is gone with the {saes} instead",
            "L0         dictionary elements active on a token, on average",
            "alive      active on at least one of the tokens",
            "expl. var. 1 is a perfect copy of the activation, 0 no better than its mean",
            "L2 ratio   length of what the SAE writes relative to what stood there",
        ]
    )


def _model_rows(evaluation: Evaluation, saes: str) -> list[list[str]]:
    def row(name: str, ce_loss: float, recovered: str = "") -> list[str]:
        return [name, f"{ce_loss:.4f}", f"{ce_loss - evaluation.ce_loss_raw:+.4f}", recovered]

    return [
        ["", "CE loss", "increase", f"recovered by {saes}"],
        ["original model", f"{evaluation.ce_loss_raw:.4f}", "", ""],
        row(f"with {saes}", evaluation.ce_loss),
        row(
            "with the mean activation instead",
            evaluation.ce_loss_mean_ablated,
            percent(evaluation.ce_recovered_mean),
        ),
        row(
            "with zeros instead",
            evaluation.ce_loss_zero_ablated,
            percent(evaluation.ce_recovered_zero),
        ),
    ]


_SAE_HEADER = ["SAE at", "L0", "alive", "expl. var.", "L2 ratio"]


def _sae_row(position: str, sae: PositionEvaluation) -> list[str]:
    alive = f"{sae.n_alive:,} of {sae.n_dict:,}"
    return [
        position,
        f"{sae.l0:,.1f}",
        alive,
        number(sae.explained_variance),
        number(sae.l2_ratio),
    ]


def percent(fraction: float) -> str:
    """A share, as a cell of a table."""
    return f"{100 * fraction:.1f} %" if math.isfinite(fraction) else UNDEFINED


def number(value: float) -> str:
    """A number of the order of 1, as a cell of a table."""
    return f"{value:.3f}" if math.isfinite(value) else UNDEFINED


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
