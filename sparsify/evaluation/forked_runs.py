"""Runs of one model on the same tokens that part before the first SAE.

Mean activations are summed here too: they decide what a run puts in place of an activation.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsify.hooked_model import Hook
from sparsify.sae_transformer import SAETransformer


class ForkedRuns:
    """Runs what comes before the first SAE once, and the rest as often as is asked for.

    Where the model cannot start at a block, every run begins with the tokens.
    """

    def __init__(self, model: SAETransformer) -> None:
        self.saes = model.saes
        self.splice_hooks = partial(model.splice_hooks, model.raw_sae_positions)
        self.positions = model.raw_sae_positions
        self.model = model.hooked_model
        can_share = self.model.can_start_at_block
        self.start = min(map(self.model.first_block, self.positions)) if can_share else 0
        self.last_sae_stop = max(map(self.model.stop_block, self.positions))

    def shared_prefix(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"] | Int[Tensor, "batch pos"]:
        """What all runs begin with: the residual stream at the first SAE's block, or the tokens."""
        return self.model.run(tokens, {}, 0, self.start) if self.start > 0 else tokens

    def suffix(
        self,
        split: Float[Tensor, "batch pos d_model"] | Int[Tensor, "batch pos"],
        hooks: Mapping[str, Hook],
        stop: int | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """One run on from the shared prefix.

        Args:
            split: The shared prefix.
            hooks: By hook point.
            stop: Block before which to stop. None runs all, to the final residual stream.
        """
        # Some Hugging Face models write to the residual stream in place, and others need it too.
        stop = self.model.n_blocks if stop is None else stop
        return self.model.run(split.clone(), hooks, self.start, stop)


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

    def add(self, position: str, act: Float[Tensor, "batch pos ..."]) -> None:
        """Add the activations of a batch. Heads, if there are, are flattened."""
        # Double precision across batches, on the CPU, as not every device has it.
        total = act.flatten(start_dim=2).sum(dim=(0, 1), dtype=torch.float32).cpu().double()
        self.sums[position] = self.sums[position] + total if position in self.sums else total

    def hooks(self, positions: Iterable[str]) -> dict[str, Hook]:
        """Hooks that add what passes."""

        def hook_at(position: str) -> Hook:
            def hook(act: Tensor) -> None:
                self.add(position, act)

            return hook

        return {position: hook_at(position) for position in positions}

    def means(self, n_tokens: int, device: torch.device) -> dict[str, Float[Tensor, " d_act"]]:
        """The mean activation at each position, in float32."""
        return {
            position: (total / n_tokens).float().to(device) for position, total in self.sums.items()
        }
