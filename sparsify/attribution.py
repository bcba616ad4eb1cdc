"""The import path of `attribute_logit` that is in use; its home is `evaluation/attribution.py`."""

from sparsify.evaluation.attribution import Attribution, Attributions, attribute_logit

__all__ = ["Attribution", "Attributions", "attribute_logit"]
