"""Fused blocks against TransformerLens's own, of models of many kinds."""

from typing import Any

import pytest
import torch
from example_models import SIZES, with_other_parameters
from torch import Tensor

from sparsify.tlens.fused_blocks import ACTIVATIONS, _FusedBlock
from sparsify.tlens.hooked_model import TLENS_HAS_HOOKED_TRANSFORMER, HookedModel, Prefix

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not TLENS_HAS_HOOKED_TRANSFORMER, reason="no HookedTransformer in 4.x"),
]

RESID = "blocks.1.hook_resid_pre"


def build(**settings: Any) -> HookedModel:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    fields: dict[str, Any] = {**SIZES, "d_vocab": 32, "act_fn": "gelu", "seed": 0, **settings}
    model = HookedTransformer(HookedTransformerConfig(**fields)).eval()
    return with_other_parameters(model)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(32, (2, 16))


def run_with_scaled_resid(model: HookedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The final residual stream, and the gradient of its norm with respect to a change inside."""
    scale = torch.full((12,), 1.5, requires_grad=True)
    resid = model.run(Prefix(tokens), {RESID: lambda act: (scale * act).to(act)}, 2)
    (grad,) = torch.autograd.grad(resid.norm(), scale)
    return resid.detach(), grad


def assert_fused_is_eager(model: HookedModel, tokens: Tensor, tolerance: float = 1e-5) -> None:
    fused = run_with_scaled_resid(model, tokens)
    model.fused_blocks = None
    eager = run_with_scaled_resid(model, tokens)
    for one, other in zip(fused, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def n_fused(model: HookedModel) -> int:
    """Blocks that are fused in a run."""
    blocks: list[_FusedBlock] = []
    fused = _FusedBlock.fused

    def counted(block: _FusedBlock, resid: Tensor) -> Tensor:
        blocks.append(block)
        return fused(block, resid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_FusedBlock, "fused", counted)
        model.run(Prefix(torch.zeros(1, 4, dtype=torch.long)), {}, 2)
    return len(blocks)


@pytest.mark.parametrize("act_fn", ACTIVATIONS)
@pytest.mark.parametrize("norm", [None, "LN", "LNPre", "RMS", "RMSPre"])
def test_plain_blocks_are_fused_with_the_same_result(norm: str | None, act_fn: str, tokens: Tensor):
    model = build(normalization_type=norm, act_fn=act_fn)
    assert n_fused(model) == 2
    assert_fused_is_eager(model, tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {"positional_embedding_type": "rotary", "rotary_dim": 4},
        {"positional_embedding_type": "rotary", "rotary_dim": 2, "rotary_adjacent_pairs": True},
        {"use_attn_scale": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
)
def test_positions_and_scales_are_kept(settings: dict[str, Any], tokens: Tensor):
    model = build(**settings)
    assert n_fused(model) == 2
    assert_fused_is_eager(model, tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.1)])
def test_other_precisions_are_fused(dtype: torch.dtype, tolerance: float, tokens: Tensor):
    model = build(dtype=dtype)
    assert n_fused(model) == 2
    assert_fused_is_eager(model, tokens, tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_only": True},
        {"gated_mlp": True},
        {"parallel_attn_mlp": True},
        {"n_key_value_heads": 1},
        {"attn_scores_soft_cap": 2.0},
        {"attention_dir": "bidirectional"},
        {"use_attn_result": True},
        {"use_split_qkv_input": True},
        {"use_hook_mlp_in": True},
        {"use_qk_norm": True},
        {"use_local_attn": True, "window_size": 4, "attn_types": ["global", "local"]},
        {"positional_embedding_type": "alibi"},
        {"positional_embedding_type": "shortformer"},
        {"act_fn": "solu_ln"},
        {"use_attention_sinks": True},
    ],
)
def test_other_blocks_run_as_they_are(settings: dict[str, Any], tokens: Tensor):
    model = build(**settings)
    assert n_fused(model) == 0
    model.run(Prefix(tokens), {}, 2)


def test_blocks_that_compute_something_else_run_as_they_are():
    from transformer_lens.components.mlps.mlp import MLP

    original = MLP.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MLP, "forward", lambda mlp, x: 1.01 * original(mlp, x))
        assert n_fused(build()) == 0


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.attn.hook_q",
        "blocks.1.attn.hook_k",
        "blocks.1.attn.hook_v",
        "blocks.1.attn.hook_rot_q",
        "blocks.1.attn.hook_rot_k",
        "blocks.1.attn.hook_z",
        "blocks.1.hook_attn_out",
        "blocks.1.hook_resid_mid",
        "blocks.1.mlp.hook_pre",
        "blocks.1.mlp.hook_post",
        "blocks.1.hook_mlp_out",
        "blocks.1.hook_resid_post",
    ],
)
def test_hook_points_of_fused_blocks_are_called(name: str, tokens: Tensor):
    model = build(positional_embedding_type="rotary", rotary_dim=4)
    seen: list[Tensor] = []

    def double(act: Tensor) -> Tensor:
        seen.append(act)
        return 2 * act

    with model.hooked({name: double}):
        assert n_fused(model) == 2
    seen.clear()
    fused = model.run(Prefix(tokens), {name: double}, 2)
    model.fused_blocks = None
    eager = model.run(Prefix(tokens), {name: double}, 2)
    torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-5)
    assert seen[0].shape == seen[1].shape


@pytest.mark.parametrize(
    "name",
    ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores", "blocks.1.ln2.hook_scale"],
)
def test_block_into_which_a_hook_looks_deeper_runs_as_it_is(name: str, tokens: Tensor):
    model = build()
    seen: list[Tensor] = []
    model.run(Prefix(tokens), {name: seen.append}, 2)
    assert len(seen) == 1
    model.model.add_hook(name, lambda act, hook: None)  # and stays
    assert n_fused(model) == 1
    model.model.reset_hooks()
    handle = model.model.blocks[0].mlp.register_forward_hook(lambda *_: None)
    assert n_fused(model) == 1
    handle.remove()
    assert n_fused(model) == 2


def test_a_run_inside_another_may_look_deeper(tokens: Tensor):
    model = build()
    seen: list[Tensor] = []
    inner = iter([True])

    def run_another(act: Tensor) -> Tensor:
        if next(inner, False):  # which comes here too
            model.run(Prefix(tokens), {"blocks.1.attn.hook_pattern": seen.append}, 2)
        return act

    model.run(Prefix(tokens), {"blocks.0.hook_resid_pre": run_another}, 2)
    assert len(seen) == 1
    assert n_fused(model) == 2


def test_switches_set_later_are_honoured():
    model = build()
    model.model.set_use_attn_result(True)
    assert n_fused(model) == 0
    model.model.set_use_attn_result(False)
    assert n_fused(model) == 2


def test_model_is_left_as_it_was(tokens: Tensor):
    model = build()
    logits = model.model(tokens)

    def fail(_: Tensor) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        model.run(Prefix(tokens), {RESID: fail}, 2)
    assert not any("forward" in vars(block) for block in model.model.blocks)
    assert torch.equal(model.model(tokens), logits)


def test_heads_are_multiplied_without_a_copy():
    model = build()
    attn = model.model.blocks[0].attn
    matrix = attn.W_Q.permute(1, 0, 2).flatten(start_dim=1)
    assert matrix.data_ptr() == attn.W_Q.data_ptr()
    weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    model.model.load_state_dict(weights)
    assert torch.equal(attn.W_Q, weights["blocks.0.attn.W_Q"])
