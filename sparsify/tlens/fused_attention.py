"""Runs the attention of TransformerLens's native model with a fused kernel, and bridges over it.

The native model computes scores and patterns of attention in several passes over tensors of
heads x positions x positions. The fused kernel never holds them. In a bridge all hook points are
called as ever, except scores and pattern; where a hook is at one of these, attention runs as it is.
So does attention of another kind, and one for which both do not give the same on a few positions.
Gradients cannot be differentiated again.

Dimensions: `n_heads` heads of width `d_head`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sparsify.tlens.fused_blocks import Module, agree, has_hook

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class FusedAttention:
    """The attention parts of a bridge that can be fused, and a context in which they are."""

    def __init__(self, model: "TransformerBridge") -> None:
        parts = [block.attn for block in model.blocks if "attn" in block._modules]
        self.parts: list[Module] = [
            part for part in parts if _can_be_fused(part.original_component, model.cfg)
        ]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """A context in which attention is fused where it is free."""
        # Not again where a pass is made inside another.
        parts = [part for part in self.parts if "forward" not in vars(part.original_component)]
        for part in parts:
            attn = part.original_component
            vars(attn)["forward"] = partial(self._forward, part, attn.forward)
        try:
            yield
        finally:
            for part in parts:
                del vars(part.original_component)["forward"]

    def is_free(self, part: Module) -> bool:
        """Return whether nothing is asked of attention now that the fused kernel does not have."""
        is_seen = has_hook(part.hook_attn_scores) or has_hook(part.hook_pattern)
        return not is_seen and _is_plain(part.original_component)

    def _forward(
        self,
        part: Module,
        eager: Callable[..., tuple[Tensor, Tensor]],
        hidden_states: Float[Tensor, "batch pos d_model"],
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        **told: Any,  # what else a bridge tells attention: the hook point of the pattern
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is not None or not self.is_free(part):
            return eager(hidden_states, attention_mask, position_ids, **told)
        return fused_attention(part.original_component, hidden_states, position_ids), None


def fused_attention(
    attn: Module,
    x: Float[Tensor, "batch pos d_model"],
    position_ids: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """Output of a causal `NativeAttention` of TransformerLens.

    Args:
        attn: The module.
        x: What it reads.
        position_ids: Positions that rotary embeddings stand for. None: from 0 on.
    """
    q, k, v = (
        rearrange(project(x), "b p (h d) -> b h p d", d=attn.d_head)
        for project in (attn.q, attn.k, attn.v)
    )
    if attn.rotary is not None:
        q, k = attn.rotary.apply_rope(q, k, position_ids=position_ids)
    shares_keys = attn.kv_repeats > 1
    z = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=1 / attn.scale, enable_gqa=shares_keys
    )
    return attn.o(rearrange(z, "b h p d -> b p (h d)"))


def _can_be_fused(attn: Module, cfg: Any) -> bool:  # `Any`: as the bridge has it
    return (
        type(attn).__name__ == "NativeAttention"
        and _is_plain(attn)
        and agree(partial(fused_attention, attn), lambda x: attn(x)[0], cfg, attn.q.weight)
    )


def _is_plain(attn: Module) -> bool:
    return attn.causal and attn.attn_scores_soft_cap <= 0
