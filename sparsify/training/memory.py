"""How much memory training SAEs takes, from shapes alone, and what to do when it is not there.

The estimate is of tensors that live at the same time in a step. What the allocator and the runtime
hold besides, often some hundred MB, is not in it.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from sparsify.kernels.chunked import fast_chunk_size, tile_size
from sparsify.sae_transformer import SAETransformer
from sparsify.settings.base_config import UserError
from sparsify.training.forward_plan import ForwardPlan

REMEDIES = {
    "model": "a smaller model",
    "SAEs": "saes.dict_size_to_input_ratio, or fewer saes.sae_positions",
    "gradients": "saes.dict_size_to_input_ratio, or fewer saes.sae_positions",
    "Adam's state": "saes.dict_size_to_input_ratio, or fewer saes.sae_positions",
    "SAE activations": "batch_size (keep effective_batch_size), or saes.dict_size_to_input_ratio",
    "block activations": "batch_size (keep effective_batch_size), or train_data.n_ctx",
    "logits": "a model with a smaller vocabulary",
    "copy to save": "saes.dict_size_to_input_ratio, or fewer saes.sae_positions",
}
"""What to lower when a term is the largest."""

CLEARLY = 1.25
"""By how much an estimate must be above what is free to say that a step does not fit."""


def estimate_memory(
    model: SAETransformer, plan: ForwardPlan, n_tokens: int, *, is_saved: bool = False
) -> dict[str, int]:
    """Bytes of a training step by what they are for, largest first.

    Args:
        model: Model and SAEs.
        plan: What a step computes.
        n_tokens: Tokens in a batch.
        is_saved: Whether the run writes checkpoints, of copies in the memory of the CPU.
    """
    saes = [model.saes.at(position) for position in plan.sae_positions]
    trained = [p for sae in saes for p in sae.parameters() if p.requires_grad]
    gradients = n_bytes(trained)
    # What an SAE reads and writes; its code before and behind the ReLU, and the code's gradient.
    sae_floats = sum(sae.d_act + sae.d_out + 3 * sae.n_dict for sae in saes)
    cfg = model.tlens_model.cfg
    # What the backward pass needs of a block: the inputs of both norms, queries, keys, values and z
    # of attention, and the MLP before its activation. Runs without gradients keep nothing.
    block_floats = 6 * cfg.d_model + (cfg.d_mlp or 0)
    n_blocks = 0 if plan.is_local else plan.spliced_stop - plan.start
    # Other outputs of the SAEs take a spliced pass of their own, which the backward pass needs too.
    if saes[0].other_weights and not plan.is_local:
        n_blocks, sae_floats = 2 * n_blocks, 2 * sae_floats
    kept = (
        len(plan.raw_positions)
        + len(plan.spliced_positions)
        + plan.needs_logits
        + plan.needs_raw_logits
    )
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
        unembed = model.hooked_model.unembed
        chunk = min(n_tokens, fast_chunk_size(unembed))
        tile = min(chunk, tile_size(unembed))
        # Of both passes: the logits of a chunk, and the probabilities of a tile of it.
        terms["logits"] = 2 * 4 * (chunk + tile) * cfg.d_vocab
    if is_saved and parameter.device.type == "cpu":
        terms["copy to save"] = terms["SAEs"] + terms["Adam's state"]
    return dict(sorted(terms.items(), key=lambda term: -term[1]))


def format_estimate(terms: dict[str, int]) -> str:
    """One line: the sum, and its parts from the largest on."""
    return f"memory of a step, estimated: {_sum_and_parts(terms)}"


def _sum_and_parts(terms: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in terms.items())
    return f"{sum(terms.values()) / 1e6:,.0f} MB ({parts})"


@contextmanager
def explained_out_of_memory(terms: dict[str, int]) -> Iterator[None]:
    """A context in which running out of memory is a message that names the largest term.

    Raises:
        UserError: In place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if (reason := _out_of_memory_reason(error)) is None:
            raise
        raise UserError(
            f"device: out of memory ({reason}). The {format_estimate(terms)}. Lower {remedy(terms)}"
        ) from error


def out_of_memory_message(error: RuntimeError) -> str | None:
    """What to lower where no estimate tells. None: the error means something else."""
    if (reason := _out_of_memory_reason(error)) is None:
        return None
    return f"device: out of memory ({reason}); use a smaller model, dictionary or batch"


def _out_of_memory_reason(error: RuntimeError) -> str | None:
    """What torch says if there was not enough memory. None: the error means something else."""
    if isinstance(error, torch.OutOfMemoryError):
        return str(error).partition(". ")[0]
    # On a CPU there is no class of its own.
    found = re.search(r"can't allocate memory: you tried to allocate \d+ bytes", str(error))
    return found and found[0]


def remedy(terms: dict[str, int]) -> str:
    """What to lower of an estimate: the settings behind its largest term."""
    # What belongs to the model cannot be made smaller as long as anything else can.
    return REMEDIES[next((name for name in terms if name != "model"), "model")]


def check_memory(terms: dict[str, int], device: str, present: Sequence[str], remedy: str) -> str:
    """See that a step has the memory that it takes.

    Args:
        terms: Bytes by what they are for.
        device: Where it is taken.
        present: Terms that are in memory already.
        remedy: What to lower if it has not.

    Returns:
        What it takes, and what is free.

    Raises:
        UserError: It takes clearly more than is free.
    """
    needed = sum(size for name, size in terms.items() if name not in present)
    free = free_memory(device)
    room = "unknown" if free is None else f"{free / 1e6:,.0f} MB"
    if free is not None and needed > CLEARLY * free:
        raise UserError(
            f"device: a step takes {needed / 1e6:,.0f} MB besides {' and '.join(present)}, but "
            f"{device} has {room} free. The {format_estimate(terms)}. Lower {remedy}"
        )
    return f"{_sum_and_parts(terms)} in a step; {room} free besides {' and '.join(present)}"


def free_memory(device: str) -> int | None:
    """Bytes that a device still has for this process, at most. None: the system does not say."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: line.split()[1] for line in lines}
        if "MemAvailable" in sizes:
            return min(1024 * int(sizes["MemAvailable"]), _limit_of_container())
    with suppress(AttributeError, ValueError, OSError):  # other systems have other names, or none
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _limit_of_container() -> int:
    with suppress(OSError, ValueError):  # "max" is no number
        return int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    return sys.maxsize


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
