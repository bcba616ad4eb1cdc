import pytest
import torch

from sparsify.settings.base_config import UserError
from sparsify.training.memory import explained_out_of_memory, free_memory, peak_bytes

CPU = torch.device("cpu")


def test_peak_is_the_most_that_is_held_at_a_time():
    kept = []

    def step() -> torch.Tensor:
        if not kept:
            kept.append(torch.zeros(1000))  # 4,000 bytes that stay
        first = torch.zeros(2000)  # 8,000 bytes, gone before the next
        del first
        return torch.zeros(3000)  # 12,000 bytes

    assert peak_bytes(step, CPU) == 4_000 + 12_000


def test_out_of_memory_names_what_to_lower():
    message = r"^device: out of memory \(CUDA out of memory\); lower batch_size$"
    with pytest.raises(UserError, match=message), explained_out_of_memory("batch_size"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")


def test_out_of_memory_on_a_cpu_is_explained_and_no_other_error():
    message = r"^device: out of memory \(can't allocate memory: you tried to allocate \d+ bytes\)"
    with pytest.raises(UserError, match=message), explained_out_of_memory("batch_size"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="a bug"), explained_out_of_memory("batch_size"):
        raise RuntimeError("a bug")


def test_this_machine_says_what_is_free():
    assert free_memory(CPU) > 1_000_000
