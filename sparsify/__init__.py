"""Train sparse autoencoders end to end inside language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsify.sae_transformer import SAETransformer
    from sparsify.splicing.interventions import ablate, scale, set_to, steer

__all__ = ["SAETransformer", "ablate", "scale", "set_to", "steer"]


def __getattr__(name: str) -> Any:  # any public name
    # Torch and TransformerLens take seconds to import, which configs and `--help` do not need.
    if name in __all__:
        module = "sae_transformer" if name == "SAETransformer" else "splicing.interventions"
        return getattr(import_module(f"sparsify.{module}"), name)
    raise AttributeError(f"module 'sparsify' has no attribute '{name}'")
