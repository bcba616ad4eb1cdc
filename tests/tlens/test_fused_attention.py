"""Fused attention against that of TransformerLens's native model, in bridges over it."""

from typing import Any

import pytest
import torch
from example_models import SIZES, with_other_parameters
from torch import Tensor

from sparsify.tlens.fused_attention import FusedAttention, fused_attention
from sparsify.tlens.hooked_model import HookedModel, Prefix

pytestmark = pytest.mark.model

RESID = "blocks.1.hook_in"


def build(**settings: Any) -> HookedModel:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    fields: dict[str, Any] = {**SIZES, "d_vocab": 32, "act_fn": "gelu", "seed": 0, **settings}
    config = TransformerBridgeConfig(**fields, architecture="TransformerLensNative")
    model = TransformerBridge.boot_native(config).eval()
    return with_other_parameters(model)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(32, (2, 16))


def run(model: HookedModel, tokens: Tensor, **hooks: Any) -> tuple[Tensor, Tensor]:
    """The final residual stream, and the gradient of its norm with respect to a change inside."""
    scale = torch.full((12,), 1.5, requires_grad=True)
    hooks = {RESID: lambda act: (scale * act).to(act), **hooks}
    resid = model.run(Prefix(tokens), hooks, 2)
    (grad,) = torch.autograd.grad(resid.norm(), scale)
    return resid.detach(), grad


def fused_parts(model: HookedModel, tokens: Tensor, **hooks: Any) -> list[bool]:
    """Of each block, whether its attention was fused in a run."""
    fused: list[Any] = []

    def counted(attn: Any, *rest: Any) -> Tensor:
        fused.append(attn)
        return fused_attention(attn, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsify.tlens.fused_attention.fused_attention", counted)
        run(model, tokens, **hooks)
    return [block.attn.original_component in fused for block in model.model.blocks]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalization_type": "RMS"},
        {"positional_embedding_type": "rotary", "rotary_dim": 4},
        {"n_heads": 4, "d_head": 3, "n_key_value_heads": 2},
        {"attn_scale": 3.0},
    ],
)
def test_fused_attention_gives_the_same(settings: dict[str, Any], tokens: Tensor):
    model = build(**settings)
    assert fused_parts(model, tokens) == [True, True]
    fused = run(model, tokens)
    model.fused_blocks = None
    torch.testing.assert_close(fused, run(model, tokens), rtol=1e-5, atol=1e-5)


def test_a_soft_cap_of_scores_is_kept(tokens: Tensor):
    assert fused_parts(build(attn_scores_soft_cap=5.0), tokens) == [False, False]


def test_a_soft_cap_that_is_set_later_is_kept(tokens: Tensor):
    model = build()
    model.model.blocks[0].attn.original_component.attn_scores_soft_cap = 5.0
    assert fused_parts(model, tokens) == [False, True]


def test_attention_that_computes_something_else_runs_as_it_is():
    model = build()
    attn = model.model.blocks[0].attn.original_component
    attn.causal_mask = torch.zeros_like(attn.causal_mask)
    assert FusedAttention(model.model).parts == [model.model.blocks[1].attn]


@pytest.mark.parametrize("name", ["hook_pattern", "hook_attn_scores"])
def test_attention_into_which_a_hook_looks_runs_as_it_is(name: str, tokens: Tensor):
    model = build()
    seen: list[Tensor] = []
    hooks = {f"blocks.0.attn.{name}": lambda act: seen.append(act) or act}
    assert fused_parts(model, tokens, **hooks) == [False, True]
    assert [act.shape for act in seen] == [(2, 3, 16, 16)]


def test_a_run_inside_another_may_look_into_attention(tokens: Tensor):
    model = build()
    seen: list[Tensor] = []
    hooks = {"blocks.1.attn.hook_pattern": lambda act: seen.append(act) or act}
    inner = iter([True])

    def run_another(act: Tensor) -> Tensor:
        if next(inner, False):  # which comes here too
            model.run(Prefix(tokens), hooks, 2)
        return act

    model.run(Prefix(tokens), {"blocks.0.hook_in": run_another}, 2)
    assert len(seen) == 1
    assert fused_parts(model, tokens) == [True, True]


@pytest.mark.parametrize("name", ["hook_q", "hook_k", "hook_v", "hook_z", "hook_out"])
def test_other_hook_points_of_fused_attention_are_called(name: str, tokens: Tensor):
    model = build()
    seen: list[Tensor] = []
    hooks = {f"blocks.0.attn.{name}": lambda act: seen.append(act.clone()) or act}
    assert fused_parts(model, tokens, **hooks) == [True, True]
    model.fused_blocks = None
    run(model, tokens, **hooks)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-5)


def test_a_mask_of_tokens_is_respected(tokens: Tensor):
    model = build()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    expected = model.model(tokens, attention_mask=mask)
    assert model.fused_blocks is not None
    with model.fused_blocks.installed():
        torch.testing.assert_close(model.model(tokens, attention_mask=mask), expected)
    assert "forward" not in vars(model.model.blocks[0].attn.original_component)
