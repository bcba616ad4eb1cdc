from typing import Any

import pytest
import torch
from conftest import TINY_MODEL
from example_saes import FIRST, KINDS, LAST, IdentitySAE, model_with
from torch import Tensor

from sparsify import SAETransformer, ablate, scale
from sparsify.evaluation.attribution import Attribution, Attributions, attribute_logit
from sparsify.kernels import sparse
from sparsify.saes.config import TopKSAEConfig
from sparsify.settings.base_config import UserError
from sparsify.splicing.interventions import Intervention
from sparsify.tlens.hooked_model import TLENS_HAS_HOOKED_TRANSFORMER
from sparsify.tlens.loading import load_hooked_model

pytestmark = pytest.mark.model

LAST_RESID = "blocks.2.hook_resid_post"
EPS = 1e-6


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (1, 6))


@torch.no_grad()
def logit(
    model: SAETransformer, tokens: Tensor, *changes: Intervention, add_error: bool = False
) -> float:
    """Of id 7 after token 4, minus that of id 3."""
    logits = model(tokens, interventions=changes, add_error=add_error)[0]
    assert logits is not None
    return (logits[0, 4, 7] - logits[0, 4, 3]).item()


def attribute(model: SAETransformer, tokens: Tensor, **options: Any) -> Attributions:
    return attribute_logit(model, tokens, 7, minus=3, token=4, **options)


def model_without_norms(is_bridge: bool) -> Any:
    config = {**TINY_MODEL, "normalization_type": None}
    if is_bridge:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge

        native = TransformerBridgeConfig(**config, architecture="TransformerLensNative")
        return TransformerBridge.boot_native(native).eval()
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return HookedTransformer(HookedTransformerConfig(**config)).eval()


IS_BRIDGE = [True, False] if TLENS_HAS_HOOKED_TRANSFORMER else [True]

# Values and laws


@pytest.mark.parametrize("is_bridge", IS_BRIDGE)
def test_attributions_behind_the_last_block_match_hand_computation(is_bridge: bool, tokens: Tensor):
    model = SAETransformer(model_without_norms(is_bridge), LAST_RESID, dict_size_to_input_ratio=2.0)
    model.saes[LAST_RESID.replace(".", "-")] = IdentitySAE(16)
    found = attribute(model, tokens)
    # Element j < 16 writes dimension j, element j + 16 minus that; logits are resid W_U + b_U.
    resid = model.forward_raw(tokens)[1][LAST_RESID][0, 4]
    unembedding = model.tlens_model.W_U[:, 7] - model.tlens_model.W_U[:, 3]
    expected = torch.zeros(6, 32)
    expected[4, :16] = unembedding * resid.clamp(min=0)
    expected[4, 16:] = unembedding * resid.clamp(max=0)
    torch.testing.assert_close(found.values[LAST_RESID], expected)
    assert found.logit == pytest.approx(logit(model, tokens), abs=1e-5)
    # b_U is zero and there is no other bias, so the attributions are the whole difference.
    assert model.tlens_model.b_U.abs().max() == 0
    assert expected.sum().item() == pytest.approx(found.logit, rel=1e-4)


@pytest.mark.parametrize("is_bridge", IS_BRIDGE)
def test_where_the_logit_is_linear_attributions_are_effects_of_ablations(
    is_bridge: bool, tokens: Tensor
):
    model = SAETransformer(model_without_norms(is_bridge), LAST_RESID, dict_size_to_input_ratio=2.0)
    plain = logit(model, tokens)
    entries = attribute(model, tokens).top(12)
    assert len(entries) == 12
    for one in entries:
        lost = plain - logit(model, tokens, ablate(one.position, one.element, one.token))
        assert one.attribution == pytest.approx(lost, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("add_error", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_attribution_is_the_effect_of_a_small_ablation(
    tlens_model: Any, tokens: Tensor, kind: str, add_error: bool
):
    """Scaling by 1 - eps takes eps times the attribution, as eps goes to zero."""
    model = model_with(tlens_model, kind).double()
    # The gradient of a later codebook is straight-through and no derivative.
    positions = [LAST] if kind == "codebook" and not add_error else [FIRST, LAST]
    found = attribute(model, tokens, add_error=add_error)
    plain = logit(model, tokens, add_error=add_error)
    assert found.logit == pytest.approx(plain)
    for position in positions:
        some = Attributions(0.0, {position: found.c[position]}, {position: found.values[position]})
        for one in some.top(4):
            change = scale(position, one.element, 1 - EPS, one.token)
            effect = (plain - logit(model, tokens, change, add_error=add_error)) / EPS
            assert one.attribution == pytest.approx(effect, rel=1e-4, abs=1e-8)
            assert abs(one.attribution) > 1e-5


def test_an_attribution_includes_what_goes_through_later_saes(tlens_model: Any, tokens: Tensor):
    model = model_with(tlens_model, "relu")
    both, alone = attribute(model, tokens), attribute(model, tokens, sae_positions=FIRST)
    assert list(both.values) == [FIRST, LAST]
    assert list(alone.values) == [FIRST]
    assert not torch.allclose(both.values[FIRST], alone.values[FIRST], rtol=0.01, atol=1e-4)
    # With errors added a later SAE writes what it reads.
    both = attribute(model, tokens, add_error=True)
    alone = attribute(model, tokens, add_error=True, sae_positions=FIRST)
    torch.testing.assert_close(both.values[FIRST], alone.values[FIRST])


def test_a_difference_of_logits_has_the_difference_of_attributions(
    tlens_model: Any, tokens: Tensor
):
    model = model_with(tlens_model, "topk")
    seven, three = (attribute_logit(model, tokens, i, token=4) for i in (7, 3))
    both = attribute(model, tokens)
    assert both.logit == pytest.approx(seven.logit - three.logit, abs=1e-5)
    for position in (FIRST, LAST):
        difference = seven.values[position] - three.values[position]
        torch.testing.assert_close(both.values[position], difference, rtol=1e-3, atol=1e-5)
    # Token -2 of 6 is token 4, and nothing behind it counts.
    from_end = attribute_logit(model, tokens, 7, token=-2)
    assert from_end.logit == seven.logit
    assert from_end.values[FIRST][:5].abs().sum() > 0
    assert (from_end.values[FIRST][5] == 0).all()


def test_top_are_the_active_elements_furthest_from_zero():
    c = {"a": torch.tensor([[1.0, 0.0], [2.0, 3.0]]), "b": torch.tensor([[0.0, 4.0]])}
    values = {"a": torch.tensor([[0.5, 0.0], [-2.0, 0.0]]), "b": torch.tensor([[0.0, 1.0]])}
    found = Attributions(logit=0.0, c=c, values=values)
    in_order = [
        Attribution("a", token=1, element=0, activation=2.0, attribution=-2.0),
        Attribution("b", token=0, element=1, activation=4.0, attribution=1.0),
        Attribution("a", token=0, element=0, activation=1.0, attribution=0.5),
        Attribution("a", token=1, element=1, activation=3.0, attribution=0.0),
    ]
    assert found.top(2) == in_order[:2]
    assert found.top(9) == in_order  # five entries of the code are zero, or not there


# What must not get in the way


def test_model_and_gradients_are_left_alone(tlens_model: Any, tokens: Tensor):
    model = model_with(tlens_model, "batch_topk").train()
    expected = attribute(model, tokens)
    assert model.saes.at(FIRST).training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.saes.requires_grad_(False)
    with torch.inference_mode():
        frozen = attribute(model, tokens.clone())
    with torch.no_grad():
        assert torch.equal(attribute(model, tokens).values[FIRST], frozen.values[FIRST])
    torch.testing.assert_close(frozen.values[FIRST], expected.values[FIRST])


def test_kernels_for_active_elements_give_the_same(
    tlens_model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
):
    model = model_with(tlens_model, "transcoder")
    expected = attribute(model, tokens)
    monkeypatch.setattr(sparse, "MIN_DENSE_SIZE", 0)
    monkeypatch.setattr(sparse, "MAX_ACTIVE_SHARE", 1.0)
    for position in (FIRST, LAST):
        model.saes.at(position).row_sparse_grads = True
    found = attribute(model, tokens)
    for position in (FIRST, LAST):
        torch.testing.assert_close(found.values[position], expected.values[position])


# A trained model


@pytest.mark.slow
def test_attributions_go_with_ablations_in_the_bundled_model():
    """SAEs of random directions, whose errors are added, so that the model is as it was trained."""
    bundled: Any = load_hooked_model("tiny-python", None, "folded")
    positions = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    sae = TopKSAEConfig(dict_size_to_input_ratio=4.0, k=24)
    model = SAETransformer(bundled, positions, sae=sae)
    tokens = model.to_tokens("def main(argv):\n    for i in range(len(")
    with torch.no_grad():
        first, second = bundled(tokens)[0, -1].topk(2).indices.tolist()
    found = attribute_logit(model, tokens, first, minus=second, add_error=True)

    @torch.no_grad()
    def logit_with(*changes: Intervention) -> float:
        last = model(tokens, interventions=changes, add_error=True)[0][0, -1]
        return (last[first] - last[second]).item()

    plain = logit_with()
    entries = found.top(60)
    effects = [plain - logit_with(ablate(o.position, o.element, o.token)) for o in entries]
    pairs = torch.tensor([[one.attribution for one in entries], effects])
    ranks = pairs.argsort(dim=1).argsort(dim=1).float()
    assert torch.corrcoef(pairs)[0, 1] > 0.9  # 0.98
    assert torch.corrcoef(ranks)[0, 1] > 0.9  # 0.96


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_id": 64}, "vocab_id: the vocabulary has no id 64; give 0 to 63"),
        ({"vocab_id": -1}, "vocabulary has no id -1"),
        ({"minus": 64}, "vocabulary has no id 64"),
        ({"minus": 7}, "minus: is vocab_id itself, 7; give another id"),
        ({"token": 6}, "token: there is no token 6 in a sequence of 6; give -6 to 5"),
        ({"sae_positions": []}, "sae_positions: names no SAE to attribute to"),
        ({"sae_positions": "hook_embed"}, f"no SAE at 'hook_embed', only at {FIRST}"),
        (
            {"tokens": torch.zeros(2, 6, dtype=torch.long)},
            r"tokens: have shape \(2, 6\); give one sequence",
        ),
        ({"tokens": "def"}, "text: the model has no tokenizer; give token ids"),
        ({"vocab_id": "def"}, "vocab_id: is text, and the model has no tokenizer"),
        ({"minus": "def"}, "minus: is text, and the model has no tokenizer"),
        ({"tokens": torch.zeros(1, 17, dtype=torch.long)}, "a sequence of 17 does not fit"),
    ],
)
def test_impossible_request_is_rejected(
    tiny_model: Any, tokens: Tensor, options: dict[str, Any], message: str
):
    model = model_with(tiny_model, "relu")
    with pytest.raises(UserError, match=message):
        attribute_logit(model, **{"tokens": tokens, "vocab_id": 7, **options})
