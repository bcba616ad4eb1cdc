"""Counts how often each dictionary element fires."""

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
        device: Where the codes are. None: torch's default device.
    """

    def __init__(self, n_dict: int, device: torch.device | str | None = None) -> None:
        self.counts: Int[Tensor, " n_dict"] = torch.zeros(n_dict, dtype=torch.int64, device=device)
        self.n_tokens = 0

    def update(self, c: Float[Tensor, "*sample n_dict"]) -> None:
        """Count the firings of the codes of some tokens."""
        if c.shape[-1] != len(self.counts):
            raise ValueError(f"c has {c.shape[-1]} entries per token, expected {len(self.counts)}")
        codes = c.detach().reshape(-1, c.shape[-1])
        self.counts += torch.count_nonzero(codes, dim=0)
        self.n_tokens += len(codes)

    def reset(self) -> None:
        """Forget all tokens."""
        self.counts.zero_()
        self.n_tokens = 0

    @property
    def n_alive(self) -> int:
        """Elements that fired at least once."""
        return int(torch.count_nonzero(self.counts))

    @property
    def l0(self) -> float:
        """Elements that fire on a token, on average over the tokens. NaN if there were none."""
        return int(self.counts.sum()) / self.n_tokens if self.n_tokens else float("nan")
