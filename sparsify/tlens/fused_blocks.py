"""Runs blocks of a frozen `HookedTransformer` with fused kernels.

TransformerLens computes a block so that every intermediate result has a hook point: attention
scores and patterns in memory, norms and activation functions in several passes, weights copied into
another layout at each call. Where no hook looks at those results, the same block can be computed
with torch's fused attention, norm and activation. All hook points whose tensors exist here are
called as ever: the residual stream, queries, keys, values and z of attention, both ends of the
MLP, and what attention and MLP write.

Only blocks of the plain kind are fused (see `_is_plain`), and only after a comparison with
TransformerLens's own result on a few positions. All others run as they are.

Dimensions: `n_heads` heads of width `d_head`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

Module = Any
"""A part of a TransformerLens model, which does not declare its own parts."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

# Switches of a TransformerLens config that change what a block computes, and are false, None or
# not above zero in a plain one.
SWITCHES = (
    "attn_only", "attn_scores_soft_cap", "clip_qkv", "gated_mlp", "load_in_4bit",
    "n_key_value_heads", "num_experts", "parallel_attn_mlp", "use_attention_sinks", "use_attn_in",
    "use_attn_result", "use_hook_mlp_in", "use_local_attn", "use_logn_attn",
    "use_normalization_before_and_after", "use_qk_norm", "use_split_qkv_input",
)  # fmt: skip


class FusedBlocks:
    """The blocks of a model that can be fused, and a context in which they are."""

    def __init__(self, model: "HookedTransformer") -> None:
        self.model = model
        self.blocks: list[_FusedBlock] = []
        if _is_plain(model.cfg):
            for block in model.blocks:
                fused = _FusedBlock(block)
                if fused.agrees():
                    lay_out_heads_side_by_side(block.attn)
                    self.blocks.append(fused)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """A context in which blocks are fused where they are free."""
        # Switches may have been set since.
        blocks = self.blocks if self.is_plain() else []
        # A block that does nothing in this run is not touched.
        blocks = [fused for fused in blocks if "forward" not in vars(fused.block)]
        for fused in blocks:
            vars(fused.block)["forward"] = fused.forward
        try:
            yield
        finally:
            for fused in blocks:
                del vars(fused.block)["forward"]

    def is_plain(self) -> bool:
        """Return whether the model is still of the kind that can be fused."""
        return _is_plain(self.model.cfg)


class _FusedBlock:
    def __init__(self, block: Module) -> None:
        self.block = block
        attn, mlp = block.attn, block.mlp
        called = [block.hook_resid_pre, block.hook_attn_out, block.hook_resid_mid]
        called += [block.hook_mlp_out, block.hook_resid_post, mlp.hook_pre, mlp.hook_post]
        called += [attn.hook_q, attn.hook_k, attn.hook_v, attn.hook_z]
        self.is_rotary = block.cfg.positional_embedding_type == "rotary"
        if self.is_rotary:
            called += [attn.hook_rot_q, attn.hook_rot_k]
        self.others = [module for module in block.modules() if module not in called]

    def is_free(self) -> bool:
        """Return whether no hook is at a part of the block that the fused one does not have."""
        return not any(has_hook(module) for module in self.others)

    def agrees(self) -> bool:
        """Return whether the fused block equals TransformerLens's own, at a few positions."""
        return agree(self.fused, self.block, self.block.cfg, self.block.mlp.W_in)

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        **told: Any,  # what else TransformerLens tells a block: caches, masks, positions
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream behind the block, which runs as it is where it is not free."""
        # Hooks may have come during the run.
        if any(value is not None for value in told.values()) or not self.is_free():
            return type(self.block).forward(self.block, resid_pre, **told)
        return self.fused(resid_pre)

    def fused(
        self, resid_pre: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream behind the block."""
        block, mlp = self.block, self.block.mlp
        resid_pre = block.hook_resid_pre(resid_pre)
        attn_out = block.hook_attn_out(self.attention(fused_norm(block.ln1, resid_pre)))
        resid_mid = block.hook_resid_mid(resid_pre + attn_out)
        pre = mlp.hook_pre(F.linear(fused_norm(block.ln2, resid_mid), mlp.W_in.T, mlp.b_in))
        post = mlp.hook_post(ACTIVATIONS[block.cfg.act_fn](pre))
        mlp_out = block.hook_mlp_out(F.linear(post, mlp.W_out.T, mlp.b_out))
        return block.hook_resid_post(resid_mid + mlp_out)

    def attention(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Output of attention."""
        attn = self.block.attn
        q = attn.hook_q(_project(x, attn.W_Q, attn.b_Q))
        k = attn.hook_k(_project(x, attn.W_K, attn.b_K))
        v = attn.hook_v(_project(x, attn.W_V, attn.b_V))
        if self.is_rotary:
            q, k = attn.hook_rot_q(attn.apply_rotary(q)), attn.hook_rot_k(attn.apply_rotary(k))
        z = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (q, k, v)),
            is_causal=True,
            scale=1 / float(attn.attn_scale),
        )
        z = attn.hook_z(z.transpose(1, 2)).flatten(start_dim=2)
        return F.linear(z, attn.W_O.flatten(end_dim=1).T, attn.b_O)


@torch.no_grad()
def agree(
    fused: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], cfg: Any, weight: Tensor
) -> bool:  # `Any`: configs of both kinds of TransformerLens model
    """Return whether both give the same for random activations at a few positions."""
    generator = torch.Generator().manual_seed(0)
    resid = torch.randn(2, min(8, cfg.n_ctx), cfg.d_model, generator=generator).to(weight)
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(fused(resid), eager(resid), rtol=tolerance, atol=tolerance)


def has_hook(module: Module) -> bool:
    """Return whether a hook is called with what a module reads or writes, or its gradients."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_plain(cfg: Any) -> bool:  # a HookedTransformerConfig, which 4.x does not have
    switches = (getattr(cfg, name, None) or 0 for name in SWITCHES)
    return (
        all(switch <= 0 for switch in switches)
        and cfg.act_fn in ACTIVATIONS
        and cfg.normalization_type in (None, "LN", "LNPre", "RMS", "RMSPre")
        and cfg.positional_embedding_type in ("standard", "rotary")
        and cfg.attention_dir == "causal"
    )


def _project(
    x: Float[Tensor, "batch pos d_model"],
    weight: Float[Tensor, "n_heads d_model d_head"],
    bias: Float[Tensor, "n_heads d_head"],
) -> Float[Tensor, "batch pos n_heads d_head"]:
    # No copy where heads are laid out side by side.
    matrix = weight.permute(1, 0, 2).flatten(start_dim=1)
    return F.linear(x, matrix.T, bias.flatten()).unflatten(-1, bias.shape)


def fused_norm(
    module: Module, x: Float[Tensor, "*sample d_model"]
) -> Float[Tensor, "*sample d_model"]:
    """Output of a norm of TransformerLens, of the kinds that plain models have."""
    if isinstance(module, nn.Identity):
        return x
    weight, bias = getattr(module, "w", None), getattr(module, "b", None)
    if type(module).__name__.startswith("RMS"):
        return F.rms_norm(x, x.shape[-1:], weight, module.eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, module.eps)


def lay_out_heads_side_by_side(attn: Module) -> None:
    """Store the weights of queries, keys and values as one matrix each.

    Shapes and values stay; only the order in memory changes, in which no copy is needed to multiply
    with all heads at once.
    """
    for weight in (attn.W_Q, attn.W_K, attn.W_V):
        weight.data = weight.data.permute(1, 0, 2).contiguous().permute(1, 0, 2)
