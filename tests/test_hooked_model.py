import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.base_config import UserError
from sparsify.hooked_model import HookedModel

pytestmark = pytest.mark.model

BETWEEN = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]


@pytest.fixture(params=["tiny_model", "tiny_bridge"])
def model(request: pytest.FixtureRequest) -> HookedModel:
    return HookedModel(request.getfixturevalue(request.param))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (2, 5))


@pytest.fixture
def twelve_blocks() -> HookedModel:
    """Blocks 1, 10 and 11 have names that begin alike."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    sizes: dict[str, Any] = {
        "n_layers": 12,
        "d_model": 4,
        "n_heads": 1,
        "d_head": 4,
        "d_mlp": 4,
        "d_vocab": 8,
    }
    config = TransformerBridgeConfig(**sizes, n_ctx=4, architecture="TransformerLensNative")
    return HookedModel(TransformerBridge.boot_native(config))


def n_hooks(model: HookedModel) -> int:
    """Hooks that torch knows of, TransformerLens's among them.

    Some are the bridge's own, from its first run on.
    """
    model.model(torch.zeros(1, 2, dtype=torch.long))
    modules = list(model.model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules) + sum(
        len(point.fwd_hooks) for point in model.model.hook_dict.values()
    )


def fail(_: Tensor) -> None:
    raise RuntimeError("out of memory")


# Names


def test_part_of_a_name_means_it_in_every_block(model: HookedModel):
    expected = [f"blocks.{i}.hook_resid_pre" for i in range(3)]
    assert model.matching_hook_names(["hook_resid_pre"], "saes.sae_positions") == expected


def test_full_name_means_itself(model: HookedModel):
    names = ["blocks.2.mlp.hook_post", "blocks.0.attn.hook_z", "hook_embed"]
    assert model.matching_hook_names(names, "saes.sae_positions") == names


def test_several_parts_must_follow_each_other(model: HookedModel):
    names = model.matching_hook_names(["mlp.hook_post"], "saes.sae_positions")
    assert names == [f"blocks.{i}.mlp.hook_post" for i in range(3)]
    with pytest.raises(UserError, match=r"no hook point 'blocks\.mlp'"):
        model.matching_hook_names(["blocks.mlp"], "saes.sae_positions")


def test_numbers_of_blocks_match_as_a_whole(twelve_blocks: HookedModel):
    names = twelve_blocks.matching_hook_names(["blocks.1"], "saes.sae_positions")
    assert "blocks.1.hook_resid_pre" in names
    assert {name.split(".")[1] for name in names} == {"1"}
    all_blocks = twelve_blocks.matching_hook_names(["hook_resid_pre"], "saes.sae_positions")
    assert len(all_blocks) == 12


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"),
        ("hook_resid_prе", "hook_resid_pre"),  # a Cyrillic letter
        ("resid_pre", "hook_resid_pre"),
        ("blocks.3.hook_resid_pre", r"blocks\.\d\.hook_resid_pre"),
    ],
)
def test_pattern_that_matches_nothing_is_rejected(model: HookedModel, pattern: str, nearest: str):
    with pytest.raises(UserError, match=rf"^sae: the model has no .*'; did you mean '{nearest}'\?"):
        model.matching_hook_names([pattern], "sae")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["hook_resid_pre", "blocks.1.hook_resid_pre"],
            "'blocks.1.hook_resid_pre' repeats 'blocks.1.hook_resid_pre', which 'hook_resid_pre'",
        ),
        (
            ["blocks.1.hook_resid_pre", "hook_resid_pre"],
            "'hook_resid_pre' repeats 'blocks.1.hook_resid_pre', which 'blocks.1.hook_resid_pre'",
        ),
    ],
)
def test_patterns_that_overlap_are_rejected(model: HookedModel, patterns: list[str], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        model.matching_hook_names(patterns, "sae_positions")


# What has an activation vector for each token


def test_shapes_come_in_the_order_of_the_model(model: HookedModel):
    names = ["blocks.2.hook_resid_post", "blocks.1.mlp.hook_post", "hook_embed"]
    names += ["blocks.1.attn.hook_z", "blocks.1.hook_attn_out", "blocks.1.hook_resid_pre"]
    n_before = n_hooks(model)
    shapes = model.probe(names, "sae_positions")
    assert list(shapes.items()) == [
        ("hook_embed", (16,)),
        ("blocks.1.hook_resid_pre", (16,)),
        ("blocks.1.attn.hook_z", (2, 8)),
        ("blocks.1.hook_attn_out", (16,)),
        ("blocks.1.mlp.hook_post", (32,)),
        ("blocks.2.hook_resid_post", (16,)),
    ]
    assert n_hooks(model) == n_before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.attn.hook_pattern", r"has shape \(1, 2, 3, 3\) for 3 tokens; an SAE needs one"),
        ("blocks.1.attn.hook_attn_scores", r"has shape \(1, 2, 3, 3\) for 3 tokens"),
        ("blocks.1.attn.hook_result", r"(use_attn_result is False|never fires)"),
        ("blocks.1.hook_mlp_in", r"(use_hook_mlp_in is False|never fires)"),
        ("ln_final.hook_normalized", "lies behind the last block"),
        ("unembed.hook_in", r"last hook point is 'blocks\.2\.hook_resid_post'"),
    ],
)
def test_unsuited_hook_point_is_rejected(model: HookedModel, name: str, message: str):
    n_before = n_hooks(model)
    with pytest.raises(UserError, match=f"^sae_positions: .*{message}"):
        model.probe([name], "sae_positions")
    assert n_hooks(model) == n_before


def test_hook_point_that_never_fires_is_rejected(tiny_bridge: Any):
    with pytest.raises(
        UserError, match=r"'blocks.0.attn.hook_hidden_states' exists but never fires"
    ):
        HookedModel(tiny_bridge).probe(["blocks.0.attn.hook_hidden_states"], "sae_positions")


# Runs


@pytest.mark.parametrize(
    ("name", "first", "stop"),
    [
        ("hook_embed", 0, 0),
        ("blocks.0.hook_resid_pre", 0, 0),
        ("blocks.1.hook_resid_pre", 1, 1),
        ("blocks.1.attn.hook_z", 1, 2),
        ("blocks.1.hook_resid_mid", 1, 2),
        ("blocks.1.hook_resid_post", 2, 2),
        ("blocks.2.mlp.hook_post", 2, 3),
        ("blocks.2.hook_resid_post", 3, 3),
    ],
)
def test_blocks_that_a_hook_point_needs(model: HookedModel, name: str, first: int, stop: int):
    assert (model.first_block(name), model.stop_block(name)) == (first, stop)


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_run_returns_the_residual_stream_where_it_stops(
    model: HookedModel, tokens: Tensor, stop: int
):
    name = "blocks.2.hook_resid_post" if stop == 3 else f"blocks.{stop}.hook_resid_pre"
    seen: list[Tensor] = []
    with torch.no_grad():
        model.run_with_logits(tokens, {name: seen.append})
        assert torch.equal(model.run(tokens, {}, 0, stop), seen[0])


def test_unembedded_final_residual_is_the_logits(model: HookedModel, tokens: Tensor):
    with torch.no_grad():
        logits = model.unembed(model.run(tokens, {}, 0, 3))
        torch.testing.assert_close(logits, model.model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("soft_cap", [0.0, 0.5])
def test_unembedding_takes_any_leading_dimensions(model: HookedModel, soft_cap: float):
    plain = model.unembed(torch.ones(4, 16))
    model.model.cfg.output_logits_soft_cap = soft_cap
    logits = model.unembed(torch.ones(2, 2, 16)).reshape(4, 64)
    # A soft cap of s keeps x near x, and within -s and s: s tanh(x / s).
    expected = soft_cap * torch.tanh(plain / soft_cap) if soft_cap else plain
    torch.testing.assert_close(logits, expected)
    assert model.unembed(torch.ones(0, 16)).shape == (0, 64)


@pytest.mark.parametrize(("start", "stop"), [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)])
def test_run_in_two_parts_is_the_whole_run(
    model: HookedModel, tokens: Tensor, start: int, stop: int
):
    if not model.can_start_at_block:
        pytest.skip("the bridge cannot start at a block")
    with torch.no_grad():
        split = model.run(tokens, {}, 0, start)
        assert torch.equal(model.run(split, {}, start, stop), model.run(tokens, {}, 0, stop))


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)])
def test_hook_between_blocks_is_called_once_and_replaces(
    model: HookedModel, tokens: Tensor, name: str, start: int, stop: int
):
    if start > 0 and not model.can_start_at_block:
        pytest.skip("the bridge cannot start at a block")
    calls: list[int] = []

    def double(act: Tensor) -> Tensor:
        calls.append(1)
        return 2 * act

    with torch.no_grad():
        split = model.run(tokens, {}, 0, start) if start else tokens
        result = model.run(split, {name: double}, start, stop)
        if stop == 1:  # between the blocks, behind both hook points
            expected = 2 * model.run(tokens, {}, 0, 1)
        else:
            last = "blocks.2.hook_resid_post" if stop == 3 else f"blocks.{stop}.hook_resid_pre"
            seen: list[Tensor] = []
            model.run_with_logits(tokens, {name: lambda act: 2 * act, last: seen.append})
            (expected,) = seen
    assert torch.equal(result, expected)
    assert calls == [1]


def n_calls(module: torch.nn.Module) -> tuple[list[int], Callable[[], None]]:
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    return calls, handle.remove


def test_run_makes_no_logits(model: HookedModel, tokens: Tensor):
    calls, remove = n_calls(model.model.unembed)
    model.run(tokens, {}, 0, 3)
    assert calls == []
    model.run_with_logits(tokens, {})
    assert calls == [1]
    remove()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_no_hook_stays_behind_a_run(model: HookedModel, tokens: Tensor, stop: int):
    name = "blocks.0.hook_mlp_out"
    n_before = n_hooks(model)
    model.run(tokens, {name: torch.zeros_like}, 0, stop)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.run(tokens, {name: fail}, 0, stop)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.run_with_logits(tokens, {name: fail})
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate(tokens, {name: fail, "hook_embed": torch.clone}, stop_at_eos=False)
    assert n_hooks(model) == n_before
    assert model.run_with_logits(tokens, {}).shape == (2, 5, 64)


def test_hooks_of_others_stay(model: HookedModel, tokens: Tensor):
    seen: list[Tensor] = []
    model.model.add_hook("blocks.0.hook_mlp_out", lambda act, hook: seen.append(act))
    model.run(tokens, {"blocks.0.hook_mlp_out": torch.zeros_like}, 0, 1)
    model.run(tokens, {}, 0, 1)
    assert len(seen) == 2
