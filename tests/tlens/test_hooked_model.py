from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from sparsify.settings.base_config import UserError
from sparsify.tlens.hooked_model import TLENS_HAS_HOOKED_TRANSFORMER, HookedModel, Prefix
from sparsify.tlens.tokenizers import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.model

BETWEEN = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]


@pytest.fixture(params=["tiny_model", "tiny_bridge"])
def model(request: pytest.FixtureRequest) -> HookedModel:
    model = HookedModel(request.getfixturevalue(request.param))
    model.fused_blocks = None  # equal to the last bit, and not only nearly
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (2, 5))


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


# Passes


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_run_returns_the_residual_stream_where_it_stops(
    model: HookedModel, tokens: Tensor, stop: int
):
    name = "blocks.2.hook_resid_post" if stop == 3 else f"blocks.{stop}.hook_resid_pre"
    seen: list[Tensor] = []
    with torch.no_grad():
        model.run_with_logits(tokens, {name: seen.append})
        assert torch.equal(model.run(Prefix(tokens), {}, stop), seen[0])


def test_unembedded_final_residual_is_the_logits(model: HookedModel, tokens: Tensor):
    with torch.no_grad():
        logits = model.unembed(model.run(Prefix(tokens), {}, 3))
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
    with torch.no_grad():
        prefix = model.prefix(tokens, start)
        assert torch.equal(model.run(prefix, {}, stop), model.run(Prefix(tokens), {}, stop))


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)])
def test_hook_between_blocks_is_called_once_and_replaces(
    model: HookedModel, tokens: Tensor, name: str, start: int, stop: int
):
    calls: list[int] = []

    def double(act: Tensor) -> Tensor:
        calls.append(1)
        return 2 * act

    with torch.no_grad():
        result = model.run(model.prefix(tokens, start), {name: double}, stop)
        if stop == 1:  # between the blocks, behind both hook points
            expected = 2 * model.run(Prefix(tokens), {}, 1)
        else:
            last = "blocks.2.hook_resid_post" if stop == 3 else f"blocks.{stop}.hook_resid_pre"
            seen: list[Tensor] = []
            model.run_with_logits(tokens, {name: lambda act: 2 * act, last: seen.append})
            (expected,) = seen
    assert torch.equal(result, expected)
    assert calls == [1]


HUGGING_FACE: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 3, "n_head": 2},
    "LlamaForCausalLM": {"num_key_value_heads": 1},
    "GPTNeoXForCausalLM": {"use_parallel_residual": True},
    "Gemma2ForCausalLM": {"head_dim": 8, "num_key_value_heads": 1, "sliding_window": 4},
    "GraniteForCausalLM": {"num_key_value_heads": 1, "logits_scaling": 3.0},
    "CohereForCausalLM": {"num_key_value_heads": 1, "logit_scale": 0.5},
}


def hugging_face_bridge(architecture: str) -> HookedModel:
    import transformers
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"vocab_size": 64, "intermediate_size": 24, "max_position_embeddings": 16}
    if architecture == "GPT2LMHeadModel":
        sizes = {"vocab_size": 64, "n_positions": 16}
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**sizes, **HUGGING_FACE[architecture])
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    return HookedModel(build_bridge_from_module(model, architecture, hf_config=config))


@pytest.mark.parametrize("architecture", HUGGING_FACE)
def test_unembedding_gives_the_logits_of_hugging_face_models(architecture: str, tokens: Tensor):
    model = hugging_face_bridge(architecture)
    model.check_unembedding()
    with torch.no_grad():
        logits = model.unembed(model.run(Prefix(tokens), {}, 3))
        torch.testing.assert_close(logits, model.model(tokens), rtol=1e-5, atol=1e-5)


def test_logits_that_are_computed_in_another_way_are_refused(tiny_model: Any):
    tiny_model.unembed.register_forward_hook(lambda *call: call[-1] + 1)
    with pytest.raises(UserError, match=r"^tlens_model: its logits are not .* loss\.logits_kl"):
        HookedModel(tiny_model).check_unembedding()


@pytest.mark.parametrize("architecture", HUGGING_FACE)
@pytest.mark.parametrize("stop", [2, 3])
def test_run_in_two_parts_is_the_whole_run_of_hugging_face_models(
    architecture: str, stop: int, tokens: Tensor
):
    model = hugging_face_bridge(architecture)
    scale = torch.tensor(1.5, requires_grad=True)
    hooks = {"blocks.1.hook_resid_pre": lambda act: scale * act}
    with torch.no_grad():
        prefix = model.prefix(tokens, 1)
        model.run(prefix, {"blocks.1.hook_resid_pre": torch.zeros_like}, stop)
    results, grads = [], []
    for begin in (prefix, Prefix(tokens)):
        result = model.run(begin, hooks, stop)
        results.append(result)
        grads += torch.autograd.grad(result.square().sum(), scale)
    assert torch.equal(*results)
    assert torch.equal(*grads)
    assert grads[0] != 0


@pytest.mark.skipif(not TLENS_HAS_HOOKED_TRANSFORMER, reason="no HookedTransformer in 4.x")
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_run_in_two_parts_keeps_what_a_block_is_told_besides(
    padding_side: Literal["left", "right"], tmp_path: Path
):
    """Position embeddings that attention adds, and the mask of padded positions."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes: dict[str, Any] = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_head": 4}
    config = HookedTransformerConfig(
        **sizes,
        n_ctx=8,
        d_vocab=270,
        attn_only=True,
        positional_embedding_type="shortformer",
        seed=0,
    )
    train_tokenizer(["def f():\n    return 1\n"] * 4, vocab_size=262).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    hooked = HookedTransformer(config, tokenizer=tokenizer, default_padding_side=padding_side)
    model = HookedModel(hooked)
    tokens = hooked.to_tokens(["def", "def f(): return 1"], prepend_bos=True)[:, :8]
    with torch.no_grad():
        whole = model.run(Prefix(tokens), {}, 2)
        assert torch.equal(model.run(model.prefix(tokens, 1), {}, 2), whole)


def n_calls(module: torch.nn.Module) -> tuple[list[int], Callable[[], None]]:
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    return calls, handle.remove


def test_run_makes_no_logits(model: HookedModel, tokens: Tensor):
    calls, remove = n_calls(model.model.unembed)
    model.run(Prefix(tokens), {}, 3)
    assert calls == []
    model.run_with_logits(tokens, {})
    assert calls == [1]
    remove()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_no_hook_stays_behind_a_run(model: HookedModel, tokens: Tensor, stop: int):
    name = "blocks.0.hook_mlp_out"
    n_before = n_hooks(model)
    model.run(Prefix(tokens), {name: torch.zeros_like}, stop)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.run(Prefix(tokens), {name: fail}, stop)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.run_with_logits(tokens, {name: fail})
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate(tokens, {name: fail, "hook_embed": torch.clone}, stop_at_eos=False)
    assert n_hooks(model) == n_before
    assert model.run_with_logits(tokens, {}).shape == (2, 5, 64)


def test_hooks_of_others_stay(model: HookedModel, tokens: Tensor):
    seen: list[Tensor] = []
    model.model.add_hook("blocks.0.hook_mlp_out", lambda act, hook: seen.append(act))
    model.run(Prefix(tokens), {"blocks.0.hook_mlp_out": torch.zeros_like}, 1)
    model.run(Prefix(tokens), {}, 1)
    assert len(seen) == 2
