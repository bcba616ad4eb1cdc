"""SAEs whose effect on a model is known, and models with SAEs of each kind."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.sae_transformer import SAETransformer
from sparsify.saes import config as sae_configs
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


READS_AND_WRITES = {
    "blocks.0.ln2.hook_normalized": "blocks.0.hook_mlp_out",
    "blocks.1.ln2.hook_normalized": "blocks.1.hook_mlp_out",
}
FIRST, LAST = READS_AND_WRITES.values()

KINDS: dict[str, dict[str, Any]] = {
    "relu": {},
    "relu_tied_bias": {},
    "topk": {"k": 5, "multi_k": 9},
    "batch_topk": {"k": 5},
    "groupmax": {"k": 8},
    "jumprelu": {"bandwidth": 0.1, "initial_threshold": 0.05},
    "gated": {},
    "matryoshka": {"k": 5, "prefix_shares": [0.25, 0.5]},
    "codebook": {"k": 5},
    "transcoder": {"k": 5, "skip": True},
}
"""Settings of each kind of SAE, for an activation of width 16."""


def model_with(tlens_model: Any, kind: str) -> SAETransformer:
    """A tiny model with two SAEs of a kind in a row, at `FIRST` and `LAST`, with random weights."""
    sae = sae_configs.KINDS[kind].model_validate({"dict_size_to_input_ratio": 2.0, **KINDS[kind]})
    reads = list(READS_AND_WRITES) if sae.reads_elsewhere else None
    model = SAETransformer(tlens_model, [FIRST, LAST], sae=sae, read_positions=reads).eval()
    with torch.no_grad():
        for position in model.raw_sae_positions:
            for parameter in model.saes.at(position).parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            model.saes.at(position).restore_constraints()
    return model
