"""How much memory training SAEs takes, from shapes alone, and what to do when it is not there.

The estimate is of tensors that live at the same time in a step. What the allocator and the runtime
hold besides, often some hundred MB, is not in it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsify.base_config import UserError
from sparsify.forward_plan import ForwardPlan
from sparsify.kernels.chunked import fast_chunk_size
from sparsify.sae_transformer import SAETransformer

REMEDIES = {
    "model": "a smaller model",
    "SAEs": "saes.dict_size_to_input_ratio, or fewer saes.sae_positions",
    "gradients": "saes.dict_size_to_input_ratio, or fewer saes.sae_positions",
    "Adam's state": "saes.dict_size_to_input_ratio, or fewer saes.sae_positions",
    "SAE activations": "batch_size (keep effective_batch_size), or saes.dict_size_to_input_ratio",
    "block activations": "batch_size (keep effective_batch_size), or train_data.n_ctx",
    "logits": "a model with a smaller vocabulary",
}
"""What to lower when a term is the largest."""

# Tensors of the size of a chunk's logits at the same time: those of both runs, and where chunks are
# not cut into tiles the log-probabilities of both.
N_LOGITS_ON_CPU, N_LOGITS = 2, 4


def estimate_memory(model: SAETransformer, plan: ForwardPlan, n_tokens: int) -> dict[str, int]:
    """Bytes of a training step by what they are for, largest first.

    Args:
        model: Model and SAEs.
        plan: What a step computes.
        n_tokens: Tokens in a batch.
    """
    saes = [model.saes.at(position) for position in plan.sae_positions]
    trained = [p for sae in saes for p in sae.parameters() if p.requires_grad]
    gradients = n_bytes(trained)
    # What an SAE reads and writes; its code before and behind the ReLU, and the code's gradient.
    sae_floats = sum(2 * sae.d_act + 3 * sae.n_dict for sae in saes)
    cfg = model.tlens_model.cfg
    # What the backward pass needs of a block: the inputs of both norms, queries, keys, values and z
    # of attention, and the MLP before its activation. Runs without gradients keep nothing.
    block_floats = 6 * cfg.d_model + (cfg.d_mlp or 0)
    n_blocks = 0 if plan.is_local else plan.spliced_stop - plan.start
    kept = len(plan.raw_positions) + len(plan.spliced_positions) + 2 * plan.needs_logits
    parameter = next(model.tlens_model.parameters())
    terms = {
        "model": n_bytes([*model.tlens_model.parameters(), *model.tlens_model.buffers()]),
        "SAEs": n_bytes(model.saes.parameters()),
        "gradients": gradients,
        "Adam's state": 2 * gradients,
        "SAE activations": 4 * n_tokens * sae_floats,
        "block activations": parameter.itemsize
        * n_tokens
        * (n_blocks * block_floats + kept * cfg.d_model),
    }
    if plan.needs_logits:
        rows = min(n_tokens, fast_chunk_size(model.hooked_model.unembed))
        n_logits = N_LOGITS_ON_CPU if parameter.device.type == "cpu" else N_LOGITS
        terms["logits"] = 4 * n_logits * rows * cfg.d_vocab
    return dict(sorted(terms.items(), key=lambda term: -term[1]))


def format_estimate(terms: dict[str, int]) -> str:
    """One line: the sum, and its parts from the largest on."""
    parts = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in terms.items())
    return f"memory of a step, estimated: {sum(terms.values()) / 1e6:,.0f} MB ({parts})"


@contextmanager
def explained_out_of_memory(terms: dict[str, int]) -> Iterator[None]:
    """A context in which running out of a GPU's memory is a message that names the largest term.

    Raises:
        UserError: In place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # What belongs to the model cannot be made smaller as long as anything else can.
        largest = next((name for name in terms if name != "model"), "model")
        reason = str(error).partition(". ")[0]
        raise UserError(
            f"device: out of memory ({reason}). The {format_estimate(terms)}. Lower "
            f"{REMEDIES[largest]}"
        ) from error


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
