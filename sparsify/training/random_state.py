"""The global random generators: set from one seed, or put back to where a run left them.

Nothing in sparsify draws from NumPy's, but libraries below it may.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


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
    """Put the generators where `get_random_state` found them."""
    version, words, gaussian = state["python"]
    random.setstate((version, tuple(words), gaussian))
    name, keys, *position = state["numpy"]
    words = keys.numpy().astype(np.uint32)
    np.random.set_state((name, words, *position))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
