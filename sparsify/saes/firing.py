"""Counter of how often each dictionary element fires."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class FiringCounter:
    """Firings of each dictionary element over all tokens since the last reset.

    An element fires on a token if its entry of the code is not zero. An element that fired at least
    once is *alive*; how many are depends on the number of tokens, so report `n_tokens` beside it.

    It holds `n_dict` integers. `update` does not wait for an accelerator; `n_alive` and `l0` do.

    Args:
        n_dict: Number of dictionary elements.
        device: Device of the codes. None: torch's default device.
    """

    def __init__(self, n_dict: int, device: torch.device | str | None = None) -> None:
        self.counts: Int[Tensor, " n_dict"] = torch.zeros(n_dict, dtype=torch.int64, device=device)
        self.n_tokens = 0

    def update(self, c: Float[Tensor, "*sample n_dict"]) -> None:
        """Count the firings of the codes of some tokens."""
        if c.shape[-1] != len(self.counts):
            raise ValueError(f"c has {c.shape[-1]} entries per token, expected {len(self.counts)}")
        codes = c.detach().reshape(-1, c.shape[-1])
        self.add(torch.count_nonzero(codes, dim=0), len(codes))

    def add(self, counts: Int[Tensor, " n_dict"], n_tokens: int) -> None:
        """Add firings that have been counted."""
        self.counts += counts
        self.n_tokens += n_tokens

    def reset(self) -> None:
        """Forget all tokens."""
        self.counts.zero_()
        self.n_tokens = 0

    def state_dict(self) -> dict[str, Any]:  # a tensor and a number
        """The counts."""
        return {"counts": self.counts, "n_tokens": self.n_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned."""
        self.counts.copy_(state["counts"])
        self.n_tokens = state["n_tokens"]

    @property
    def n_alive(self) -> int:
        """Elements that fired at least once."""
        return int(torch.count_nonzero(self.counts))

    @property
    def l0(self) -> float:
        """Elements that fire on a token, on average over the tokens. NaN if there were none."""
        return int(self.counts.sum()) / self.n_tokens if self.n_tokens else float("nan")
