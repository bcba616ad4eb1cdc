"""Compiling what training computes."""

from sparsify.kernels.compiled import why_not_compiled
from sparsify.sae_transformer import SAETransformer
from sparsify.settings.base_config import UserError


def compile_kernels(model: SAETransformer) -> None:
    """Have `model` compute the KL of logits with a compiled kernel.

    Raises:
        UserError: torch cannot compile here.
    """
    device = model.device
    if (reason := why_not_compiled(device)) is not None:
        needed = "a C++ compiler" if device.type == "cpu" else "Triton"
        raise UserError(
            f"compile: torch cannot compile for {device.type} ({reason}); install {needed}, or set "
            "compile to false"
        )
    model.hooked_model.is_compiled = True
