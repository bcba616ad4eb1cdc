"""How a model's weights were processed, told from the model."""

from typing import Literal

from sparsify.tlens.hooked_model import TLensModel


def processing_of(model: TLensModel) -> Literal["folded", "raw"] | None:
    """Return whether layer norms were folded into a model's weights. None: it has none.

    A folded norm is called `LNPre` or `RMSPre`. That the weights that write to the residual stream
    were centred, too, no model says; TransformerLens does both or neither unless it is told to.
    """
    kind = str(model.cfg.normalization_type or "")
    if getattr(model, "compatibility_mode", False):  # of a bridge, whose config stays as it was
        return "folded"
    if kind.endswith("Pre"):
        return "folded"
    return "raw" if kind else None
