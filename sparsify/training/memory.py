"""Memory that training takes, as measured, and what to lower when there is too little."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparsify.settings.base_config import UserError


def peak_bytes(work: Callable[[], object], device: torch.device | str) -> int:
    """Return the most memory that `work` holds at a time beyond what was there before it.

    That is the memory of tensors. On other devices than a CUDA GPU it is that of tensors in the
    memory of the CPU, without what the allocator keeps in reserve.
    """
    device = torch.device(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _silent_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        work()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]  # `Any`: torch's stub lacks what an event has
    held = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(held), default=0)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    # The profiler of torch 2.13 writes lines there from C++, whatever its log level.
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def free_memory(device: torch.device | str) -> int:
    """Return the bytes that a device still has for this process, at most."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, _limit_of_container())


def _limit_of_container() -> int:
    with suppress(OSError, ValueError):  # "max" is not a number
        return int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    return sys.maxsize


@contextmanager
def explained_out_of_memory(remedies: str) -> Iterator[None]:
    """A context in which running out of memory is a message that names settings to lower.

    Raises:
        UserError: In place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if (message := out_of_memory_message(error, remedies)) is None:
            raise
        raise UserError(message) from error


def out_of_memory_message(
    error: RuntimeError, remedies: str = "the size of the model, the dictionary or the batch"
) -> str | None:
    """Return what to say of an error if it means too little memory. None: it does not."""
    if isinstance(error, torch.OutOfMemoryError):
        reason = str(error).partition(". ")[0]
    # On a CPU there is no class of its own.
    elif found := re.search(r"can't allocate memory: you tried to allocate \d+ bytes", str(error)):
        reason = found[0]
    else:
        return None
    return f"device: out of memory ({reason}); lower {remedies}"


def in_mb(size: int) -> str:
    """Write a number of bytes in megabytes."""
    return f"{size / 1e6:,.0f} MB"


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
