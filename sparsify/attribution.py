"""Import path of `attribute_logit` that code in use has; `evaluation/attribution.py` is its home."""

from sparsify.evaluation.attribution import Attribution, Attributions, attribute_logit

__all__ = ["Attribution", "Attributions", "attribute_logit"]
