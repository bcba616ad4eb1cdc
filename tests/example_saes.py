"""SAEs whose effect on a model is known."""

import torch
from torch import Tensor, nn

from sparsify.saes.base import SAE, NewElements


class IdentitySAE(SAE):
    """Writes what it reads."""

    def __init__(self, d_act: int) -> None:
        super().__init__(d_act, 2 * d_act)

    def encode(self, input: Tensor) -> Tensor:
        return torch.cat([input.relu(), (-input).relu()], dim=-1)

    def decode(self, c: Tensor) -> Tensor:
        positive, negative = c.chunk(2, dim=-1)
        return positive - negative

    @property
    def dict_elements(self) -> Tensor:
        return torch.cat([torch.eye(self.d_act), -torch.eye(self.d_act)])

    def element_parameters(self) -> list[nn.Parameter]:
        return []

    def reset_elements(self, new: NewElements) -> None:
        """It has nothing that could change."""


class FailingSAE(IdentitySAE):
    def encode(self, input: Tensor) -> Tensor:
        raise RuntimeError("out of memory")
