"""The global random generators: set from one seed, or put back to where a run left them.

Nothing in sparsify draws from NumPy's, but libraries below it may.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sparsify.training.state_check import check_like, check_tensor, require


def set_seed(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def get_random_state() -> dict[str, Any]:
    """Return the state of the generators, in plain containers and tensors."""
    name, keys, *position = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators where `get_random_state` found them.

    Raises:
        MisfitError: The state is not of these generators.
    """
    check_like(state, {**get_random_state(), "cuda": []}, "random")
    version, words, gaussian = state["python"]
    random.setstate((version, tuple(words), gaussian))
    name, keys, *position = state["numpy"]
    # NumPy does not look, and would read beyond the words.
    require(position[0] <= len(keys), position[0], f"at most {len(keys)}", "random.numpy")
    words = keys.numpy().astype(np.uint32)
    np.random.set_state((name, words, *position))  # noqa: NPY002
    # Torch reads the memory of these as it comes, whatever their strides.
    torch.set_rng_state(state["torch"].contiguous())
    # A run may go on where there are more GPUs, or fewer.
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, words in enumerate(state["cuda"][:n_devices]):
        like = torch.cuda.get_rng_state(device)
        torch.cuda.set_rng_state(check_tensor(words, like, "random.cuda").contiguous(), device)
