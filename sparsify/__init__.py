"""Train sparse autoencoders end to end inside language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsify.sae_transformer import SAETransformer

__all__ = ["SAETransformer"]


def __getattr__(name: str) -> Any:  # any public name
    # Torch and TransformerLens take seconds to import, which configs and `--help` do not need.
    if name == "SAETransformer":
        from sparsify.sae_transformer import SAETransformer

        return SAETransformer
    raise AttributeError(f"module 'sparsify' has no attribute '{name}'")
