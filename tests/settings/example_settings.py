"""Settings of each form that a field can have, and a file that fills them."""

from pathlib import Path
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from sparsify.settings.base_config import BaseConfig


class Term(BaseConfig):
    coeff: float
    """Weight of the term."""
    p_norm: PositiveFloat = 1.0


class Terms(BaseConfig):
    sparsity: Term | None = None
    logits_kl: Term | None = None


class Places(BaseConfig):
    sae_positions: list[str]
    """Where they sit."""
    paths: list[Path] | None = None


class Settings(BaseConfig):
    lr: PositiveFloat
    """Step size."""
    n_samples: PositiveInt | None = None
    schedule: Literal["cosine", "linear"] = "cosine"
    shuffle: bool = False
    name: str | None = None
    loss: Terms
    saes: Places


YAML = """\
lr: 1e-3
loss:
  sparsity: {coeff: 0.5}
  logits_kl: null
saes:
  sae_positions: [a.b, c.d]
"""
