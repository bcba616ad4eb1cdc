"""The loss that trains SAEs.

Its settings are readable without torch: `LossConfig` in `loss.py`, with the formula of the total,
its terms in `terms.py` and `code_terms.py`, and `ignored_tokens.py`.

Its computation is in `total.py` (the weighted sum), `values.py` (one function a term),
`functions.py` and `dead.py` (their math), `passes.py` (what they are computed from) and `kept.py`
(the tokens and predictions that count). CONTRIBUTING.md says how to add a term.
"""

from sparsify.losses.loss import LossConfig

__all__ = ["LossConfig"]
