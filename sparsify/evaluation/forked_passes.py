"""Passes of one model on the same tokens that part before the first SAE.

Mean activations are summed here too: they decide what a pass puts in place of an activation.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsify.sae_transformer import SAETransformer
from sparsify.tlens.hook_names import first_block, stop_block
from sparsify.tlens.hooked_model import Hook, Prefix


class ForkedPasses:
    """Passes that share what comes before the first SAE, which is computed once."""

    def __init__(self, model: SAETransformer) -> None:
        self.saes = model.saes
        self.splice_hooks = partial(model.splice_hooks, model.raw_sae_positions)
        self.positions = model.raw_sae_positions
        self.model = model.hooked_model
        self.start = min(map(first_block, model.reads.values()))
        self.last_sae_stop = max(map(stop_block, self.positions))

    def shared_prefix(self, tokens: Int[Tensor, "batch pos"]) -> Prefix:
        """The part with which all passes begin."""
        return self.model.prefix(tokens, self.start)

    def suffix(
        self, prefix: Prefix, hooks: Mapping[str, Hook], stop: int | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """One pass on from the shared prefix, with hooks by hook point.

        `stop` is the block before which to stop. None computes all, to the final residual stream.
        """
        return self.model.run(prefix, hooks, self.model.n_blocks if stop is None else stop)


def constant_hooks(vectors: Mapping[str, Float[Tensor, " d_act"]]) -> dict[str, Hook]:
    """Hooks that put a vector in place of every token's activation, by position."""

    def hook_with(vector: Tensor) -> Hook:
        def hook(act: Tensor) -> Tensor:
            return vector.to(act).reshape(act.shape[2:]).expand(act.shape).contiguous()

        return hook

    return {position: hook_with(vector) for position, vector in vectors.items()}


class ActSums:
    """Sums of activations over tokens, by position."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(
        self,
        position: str,
        act: Float[Tensor, "batch pos ..."],
        kept: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        """Add a batch's activations of the tokens that are kept. Heads, if any, are flattened."""
        # Double precision across batches, on the CPU, as not every device has it.
        rows = act.flatten(start_dim=2)
        rows = rows.flatten(end_dim=1) if kept is None else rows[kept]
        total = rows.sum(dim=0, dtype=torch.float32).cpu().double()
        self.sums[position] = self.sums[position] + total if position in self.sums else total

    def hooks(
        self, positions: Iterable[str], kept: Bool[Tensor, "batch pos"] | None = None
    ) -> dict[str, Hook]:
        """Hooks that add what passes, of the tokens that are kept."""

        def hook_at(position: str) -> Hook:
            def hook(act: Tensor) -> None:
                self.add(position, act, kept)

            return hook

        return {position: hook_at(position) for position in positions}

    def means(self, n_tokens: int, device: torch.device) -> dict[str, Float[Tensor, " d_act"]]:
        """The mean activation at each position, in float32."""
        return {
            position: (total / n_tokens).float().to(device) for position, total in self.sums.items()
        }
