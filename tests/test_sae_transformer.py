from collections.abc import Callable
from typing import Any

import pytest
import torch
from example_saes import FailingSAE, IdentitySAE
from torch import Tensor

from sparsify import SAETransformer
from sparsify.evaluation.attribution import attribute_logit
from sparsify.evaluation.evaluate import evaluate
from sparsify.losses.loss import LossConfig
from sparsify.losses.total import total_loss
from sparsify.saes.acts import CacheActs, SAEActs
from sparsify.saes.base import SAE
from sparsify.saes.config import ReLUSAEConfig
from sparsify.settings.base_config import UserError
from sparsify.splicing.sae_dict import sae_key
from sparsify.training.forward_passes import forward_passes
from sparsify.training.forward_plan import derive_plan

pytestmark = pytest.mark.model

WIDTHS = {
    "hook_embed": 16,
    "blocks.0.hook_resid_pre": 16,
    "blocks.0.attn.hook_z": 16,  # 2 heads of 8
    "blocks.0.hook_attn_out": 16,
    "blocks.1.mlp.hook_post": 32,
    "blocks.1.hook_mlp_out": 16,
    "blocks.2.hook_resid_post": 16,
}
ALL = list(WIDTHS)
RESID = ["blocks.1.hook_resid_pre"]
E2E = LossConfig.model_validate(
    {
        "sparsity": {"coeff": 0.1},
        "logits_kl": {"coeff": 1.0},
        "out_to_orig": {"coeff": 1.0},
        "in_to_orig": {"hook_positions": ["blocks.2.hook_mlp_out"], "total_coeff": 1.0},
    }
)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (2, 6))


def build(tlens_model: Any, positions: list[str]) -> SAETransformer:
    return SAETransformer(tlens_model, positions, dict_size_to_input_ratio=2.0)


def put_saes(model: SAETransformer, make: Callable[[int], SAE]) -> None:
    for position in model.raw_sae_positions:
        model.saes[position] = make(model.saes[position].d_act)


def n_hooks(tlens_model: Any) -> int:
    """Hooks that torch knows of, TransformerLens's among them.

    Some are the bridge's own, from its first run on.
    """
    tlens_model(torch.zeros(1, 2, dtype=torch.long))
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in tlens_model.modules()
    ) + sum(len(point.fwd_hooks) for point in tlens_model.hook_dict.values())


# Laws


def test_raw_run_is_the_bare_model_to_the_last_bit(tlens_model: Any, tokens: Tensor):
    bare = tlens_model(tokens)
    logits, acts = build(tlens_model, ALL).forward_raw(tokens)
    assert logits is not None
    assert torch.equal(logits, bare)
    assert list(acts) == ALL


def test_sae_that_returns_its_input_leaves_the_logits_unchanged(tlens_model: Any, tokens: Tensor):
    bare = tlens_model(tokens)
    model = build(tlens_model, ALL)
    put_saes(model, IdentitySAE)
    logits, acts = model(tokens)
    assert torch.equal(logits, bare)
    for position in ALL:
        torch.testing.assert_close(acts[position].output, acts[position].input, rtol=0, atol=0)


def test_sae_changes_the_logits(tlens_model: Any, tokens: Tensor):
    bare = tlens_model(tokens)
    for position in ALL:
        logits, _ = build(tlens_model, [position])(tokens)
        assert not torch.allclose(logits, bare, atol=1e-4), position


@pytest.mark.parametrize("positions", [RESID, ALL[2:]], ids=["one", "several"])
def test_gradients_reach_the_saes_alone(tlens_model: Any, tokens: Tensor, positions: list[str]):
    model = build(tlens_model, positions)
    assert not any(parameter.requires_grad for parameter in tlens_model.parameters())
    plan = derive_plan(model, E2E)
    loss, _ = total_loss(E2E, forward_passes(model, tokens, plan))
    loss.backward()
    assert all(parameter.grad is None for parameter in tlens_model.parameters())
    for name, parameter in model.saes.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_no_hook_is_left_behind(tlens_model: Any, tokens: Tensor):
    n_before = n_hooks(tlens_model)
    model = build(tlens_model, ALL)
    plan = derive_plan(model, E2E)
    model(tokens, cache_positions=["blocks.1.hook_resid_mid"])
    model.forward_raw(tokens)
    model.forward_raw(tokens, run_entire_model=False)
    forward_passes(model, tokens, plan)
    model.generate(tokens, **GREEDY)
    assert n_hooks(tlens_model) == n_before


def test_no_hook_is_left_behind_an_exception(tlens_model: Any, tokens: Tensor):
    n_before, bare = n_hooks(tlens_model), tlens_model(tokens)
    model = build(tlens_model, RESID)
    plan = derive_plan(model, E2E)
    put_saes(model, FailingSAE)
    for call in (
        lambda: model(tokens),
        lambda: forward_passes(model, tokens, plan),
        lambda: model.generate(tokens, **GREEDY),
    ):
        with pytest.raises(RuntimeError, match="out of memory"):
            call()
        assert n_hooks(tlens_model) == n_before
    assert torch.equal(tlens_model(tokens), bare)


# What the runs return


def test_saes_sit_at_their_hook_points_in_the_order_of_the_model(tlens_model: Any):
    model = build(tlens_model, ALL[::-1])
    assert model.raw_sae_positions == ALL
    assert list(model.saes) == [sae_key(position) for position in ALL]
    widths = {position: model.saes[position].d_act for position in ALL}
    assert widths == WIDTHS
    assert all(model.saes[position].n_dict == 2 * width for position, width in widths.items())


def test_spliced_run_shows_what_each_sae_did(tlens_model: Any, tokens: Tensor):
    model = build(tlens_model, ALL)
    logits, acts = model(tokens, cache_positions=["blocks.2.attn.hook_z"])
    assert logits.shape == (2, 6, 64)
    assert set(acts) == {*ALL, "blocks.2.attn.hook_z"}
    for position, width in WIDTHS.items():
        sae_acts = acts[position]
        assert isinstance(sae_acts, SAEActs)
        assert sae_acts.input.shape == sae_acts.output.shape == (2, 6, width)
        assert sae_acts.c.shape == (2, 6, 2 * width)
        expected = model.saes[position](sae_acts.input)
        torch.testing.assert_close(sae_acts.output, expected.output)
    cached = acts["blocks.2.attn.hook_z"]
    assert isinstance(cached, CacheActs)
    assert cached.input.shape == (2, 6, 16)


def test_only_the_named_saes_take_part(tlens_model: Any, tokens: Tensor):
    first, last = "blocks.0.hook_attn_out", "blocks.2.hook_resid_post"
    model = build(tlens_model, [first, last])
    bare = tlens_model(tokens)
    logits, acts = model(tokens, sae_positions=[last])
    assert list(acts) == [last]
    _, orig_acts = model.forward_raw(tokens)
    torch.testing.assert_close(acts[last].input, orig_acts[last], rtol=0, atol=0)
    assert not torch.allclose(logits, bare)
    logits, acts = model(tokens, sae_positions=[])
    assert acts == {}
    assert torch.equal(logits, bare)


def test_all_saes_take_part_unless_some_are_named(tlens_model: Any, tokens: Tensor):
    model = build(tlens_model, ALL)
    spliced, generated = model(tokens)[0], new_tokens(model, tokens)
    for every in ("all", None, ALL):
        assert torch.equal(model(tokens, sae_positions=every)[0], spliced)
        assert torch.equal(new_tokens(model, tokens, sae_positions=every), generated)
        assert torch.equal(model.run_with_cache(tokens, sae_positions=every)[0], spliced)
        attributed = attribute_logit(model, tokens[:1], 3, sae_positions=every)
        assert attributed.logit == pytest.approx(spliced[0, -1, 3].item(), rel=1e-5)
        assert set(attributed.values) == set(ALL)
    assert not torch.equal(new_tokens(model, tokens, sae_positions=[]), generated)


def test_sae_is_found_by_its_position(tlens_model: Any):
    model = build(tlens_model, RESID)
    assert model.saes[RESID[0]] is model.saes["blocks-1-hook_resid_pre"]
    assert RESID[0] in model.saes


def test_saes_can_read_given_activations(tlens_model: Any, tokens: Tensor):
    model = build(tlens_model, ALL)
    _, orig_acts = model.forward_raw(tokens)
    logits, acts = model(None, orig_acts=orig_acts)
    assert logits is None
    for position in ALL:
        expected = orig_acts[position].flatten(start_dim=2)
        torch.testing.assert_close(acts[position].input, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="tokens may only be None if orig_acts is given"):
        model(None)


def test_raw_run_may_stop_when_all_activations_are_there(tlens_model: Any, tokens: Tensor):
    model = build(tlens_model, RESID)
    other = "blocks.1.hook_mlp_out"
    calls: list[int] = []
    handle = tlens_model.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    logits, acts = model.forward_raw(tokens, run_entire_model=False, cache_positions=[other])
    assert (logits, calls, set(acts)) == (None, [], {*RESID, other})
    _, whole = model.forward_raw(tokens, cache_positions=[other])
    for position, act in acts.items():
        assert torch.equal(act, whole[position])
    logits, acts = model.forward_raw(tokens, run_entire_model=False, final_layer=0)
    assert (logits, acts) == (None, {})
    handle.remove()


def test_the_model_stays_in_evaluation_mode(tlens_model: Any):
    model = build(tlens_model, RESID).train()
    assert all(sae.training for sae in model.saes.modules())
    assert not any(module.training for module in tlens_model.modules())


# Generation


def continue_greedily(logits_of: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            tokens = torch.cat([tokens, logits_of(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    return tokens


def new_tokens(model: SAETransformer, tokens: Tensor, **options: Any) -> Tensor:
    generated = model.generate(tokens, **options, **GREEDY)
    assert isinstance(generated, Tensor)
    return generated


def test_generation_without_saes_is_the_bare_models(tlens_model: Any, tokens: Tensor):
    expected = continue_greedily(tlens_model, tokens)
    model = build(tlens_model, ALL)
    assert torch.equal(new_tokens(model, tokens, sae_positions=[]), expected)
    put_saes(model, IdentitySAE)
    assert torch.equal(new_tokens(model, tokens), expected)
    # What TransformerLens makes of its own position embeddings when it caches is another matter.
    options = {"use_past_kv_cache": False, "verbose": False, **GREEDY}
    assert torch.equal(tlens_model.generate(tokens, **options), expected)


@pytest.mark.parametrize("position", ALL)
def test_generation_is_that_of_the_spliced_model(tlens_model: Any, tokens: Tensor, position: str):
    model = build(tlens_model, [position])
    for sae in model.saes.values():
        # Writes far from what it reads, so that another token is the likeliest.
        torch.nn.init.normal_(sae.get_parameter("decoder.bias"), std=4)
    expected = continue_greedily(lambda some: model(some)[0], tokens)
    assert torch.equal(new_tokens(model, tokens), expected)
    assert not torch.equal(continue_greedily(tlens_model, tokens), expected)


# Precision and device


def test_moving_and_casting_tells_the_models_config(tlens_model: Any, tokens: Tensor):
    model = build(tlens_model, ALL)
    assert model.to(torch.bfloat16) is model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert tlens_model.cfg.dtype == torch.bfloat16
    logits, acts = model(tokens)
    assert logits.dtype == acts[ALL[0]].output.dtype == torch.bfloat16
    model.double()  # no call of `to`
    assert model(tokens)[0].dtype == tlens_model.cfg.dtype == torch.float64
    model.to("cpu", torch.float32)
    assert tlens_model.cfg.dtype == torch.float32
    assert str(tlens_model.cfg.device) == "cpu"
    assert model(tokens)[0].dtype == torch.float32


def test_saes_keep_their_precision_in_a_model_of_less(
    tlens_model: Any, tokens: Tensor, capsys: pytest.CaptureFixture[str]
):
    tlens_model.to(torch.bfloat16)
    model = build(tlens_model, ALL[2:])
    assert {parameter.dtype for parameter in model.saes.parameters()} == {torch.float32}
    logits, acts = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert {a.output.dtype for a in acts.values()} == {torch.float32}
    plan = derive_plan(model, E2E)
    loss, values = total_loss(E2E, forward_passes(model, tokens, plan))
    assert all(value.isfinite() for value in values.values())
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.saes.parameters())


def test_a_single_position_may_be_given_by_its_name(tlens_model: Any, tokens: Tensor):
    (name,), other = RESID, "blocks.1.hook_mlp_out"
    model = SAETransformer(tlens_model, name, dict_size_to_input_ratio=3.0)
    assert model.raw_sae_positions == [name]
    assert set(model(tokens, sae_positions=name, cache_positions=other)[1]) == {name, other}
    assert set(model.forward_raw(tokens, cache_positions=other)[1]) == {name, other}
    assert torch.equal(new_tokens(model, tokens, sae_positions=name), new_tokens(model, tokens))


# Refusals


def test_sequence_beyond_the_context_is_rejected_and_the_model_still_trains(tlens_model: Any):
    model = build(tlens_model, ["hook_embed"])
    long, message = torch.zeros(1, 17, dtype=torch.long), "a sequence of 17 does not fit"
    calls: list[Callable[[], object]] = [
        lambda: model(long),
        lambda: model.forward_raw(long),
        lambda: model.generate(long[:, :14], **GREEDY),  # 14 tokens and 3 of the 4 new ones
        lambda: evaluate(model, [long]),
    ]
    for call in calls:
        with pytest.raises(UserError, match=message):
            call()
    assert new_tokens(model, long[:, :13]).shape[-1] == 17
    model(long[:, :16])[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.saes.parameters())


def test_missing_activation_is_rejected(tiny_model: Any):
    with pytest.raises(UserError, match=r"orig_acts: has no activation for blocks\.1\.hook_resid"):
        build(tiny_model, RESID)(None, orig_acts={})


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([], "sae_positions: names no hook point"),
        ([RESID[0], ALL[0], RESID[0]], "blocks.1.hook_resid_pre given twice"),
        (["blocks.1.hook_resid_pr"], "did you mean 'blocks.1.hook_resid_pre'"),
        (["blocks.1.attn.hook_pattern"], "an SAE needs one vector per token"),
        (["ln_final.hook_normalized"], "lies behind the last block"),
    ],
)
def test_impossible_positions_are_rejected(tlens_model: Any, positions: list[str], message: str):
    with pytest.raises(UserError, match=message):
        build(tlens_model, positions)


def test_two_names_of_one_hook_point_are_rejected(tiny_bridge: Any):
    with pytest.raises(UserError, match="are the same hook point; one SAE fits there"):
        build(tiny_bridge, ["blocks.1.hook_in", "blocks.1.hook_resid_pre"])


def test_size_is_given_once(tiny_model: Any):
    sae = ReLUSAEConfig(dict_size_to_input_ratio=3.0)
    assert SAETransformer(tiny_model, RESID, sae=sae).saes[RESID[0]].n_dict == 48  # 3 * 16
    for ratio, config in ((None, None), (3.0, sae)):
        with pytest.raises(UserError, match="give one of dict_size_to_input_ratio, sae and saes"):
            SAETransformer(tiny_model, RESID, ratio, sae=config)
    with pytest.raises(UserError, match="dict_size_to_input_ratio: Input should be greater than 0"):
        SAETransformer(tiny_model, RESID, 0.0)


def test_position_without_an_sae_is_rejected(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, RESID)
    message = "no SAE at 'blocks.1.hook_mlp_out', only at blocks.1.hook_resid_pre"
    with pytest.raises(UserError, match=message):
        model(tokens, sae_positions=["blocks.1.hook_mlp_out"])
    with pytest.raises(UserError, match=message):
        model.generate(tokens, sae_positions=["blocks.1.hook_mlp_out"])


def test_unknown_cache_position_is_rejected(tlens_model: Any, tokens: Tensor):
    model = build(tlens_model, RESID)
    for call in (model.forward, model.forward_raw):
        with pytest.raises(UserError, match=r"did you mean 'blocks\.2\.hook_mlp_out'"):
            call(tokens, cache_positions=["blocks.2.hook_mlp_ou"])


def test_cache_position_that_a_run_does_not_reach_is_rejected(tlens_model: Any, tokens: Tensor):
    model = build(tlens_model, RESID)
    behind = ["ln_final.hook_normalized"]
    _, acts = model.forward_raw(tokens, cache_positions=behind)
    assert acts[behind[0]].shape == (2, 6, 16)
    with pytest.raises(UserError, match=r"'ln_final.hook_normalized' did not fire in this pass"):
        model.forward_raw(tokens, run_entire_model=False, cache_positions=behind)
