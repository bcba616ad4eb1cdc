"""In which precision a training run multiplies."""

import torch

from sparsify.sae_transformer import SAETransformer
from sparsify.settings.base_config import UserError


def set_precision(model: SAETransformer, mixed: bool | None) -> bool:
    """Set the precision of matrix products, for `model` and on a GPU for this process.

    Mixed precision multiplies in bfloat16 inside the frozen model, whose residual stream stays in
    the precision of its weights. What trains stays in float32: the SAEs' weights, their gradients
    and the state of Adam. Their products, and those that make logits for the KL, use
    TensorFloat-32 on a GPU: numbers with 10 bits of mantissa, summed in float32.

    Args:
        model: Model and SAEs.
        mixed: Whether to. None: on a GPU that has bfloat16.

    Returns:
        Whether it is mixed now.

    Raises:
        UserError: The model's weights have a precision that does not mix.
    """
    device = model.device
    is_gpu = device.type == "cuda"
    is_mixed = is_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    is_mixed = is_mixed if mixed is None else mixed
    dtype = next(model.tlens_model.parameters()).dtype
    if is_mixed and dtype not in (torch.float32, torch.bfloat16):
        raise UserError(
            f"mixed_precision: the model's weights are {dtype}, which bfloat16 does not mix with; "
            "load it in float32 or bfloat16, or set mixed_precision to false"
        )
    model.hooked_model.product_dtype = torch.bfloat16 if is_mixed else None
    if is_gpu:
        torch.set_float32_matmul_precision("high" if is_mixed else "highest")
    return is_mixed
