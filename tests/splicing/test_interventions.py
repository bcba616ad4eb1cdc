from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from example_saes import FIRST, KINDS, LAST, IdentitySAE, model_with
from torch import Tensor

from sparsify import SAETransformer, ablate, scale, set_to, steer
from sparsify.runs.config import PLACED
from sparsify.saes.acts import SAEActs
from sparsify.settings.base_config import UserError
from sparsify.splicing.interventions import Intervention

pytestmark = pytest.mark.model

GREEDY = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (2, 6))


@torch.no_grad()
def run(
    model: SAETransformer, tokens: Tensor, *interventions: Intervention, add_error: bool = False
) -> tuple[Tensor, dict[str, SAEActs]]:
    logits, acts = model(tokens, interventions=interventions, add_error=add_error)
    return logits, acts


def new_tokens(model: SAETransformer, prompt: Tensor, **options: Any) -> Tensor:
    generated = model.generate(prompt, **options, **GREEDY)
    assert isinstance(generated, Tensor)
    return generated


def elements_of(acts: SAEActs) -> tuple[int, int]:
    """One element that is active on most tokens, and the least active one."""
    n_active = (acts.c != 0).flatten(end_dim=-2).sum(dim=0)
    return int(n_active.argmax()), int(n_active.argmin())


# Values


def identity_model(tlens_model: Any) -> SAETransformer:
    """Element j < 16 of its SAE is dimension j of the activation if positive, j + 16 if not."""
    model = SAETransformer(tlens_model, [LAST], dict_size_to_input_ratio=2.0)
    model.saes[LAST] = IdentitySAE(16)
    return model


def test_edited_output_matches_hand_computation(tlens_model: Any, tokens: Tensor):
    model = identity_model(tlens_model)
    _, plain = run(model, tokens)
    changes = [
        ablate(LAST, 3),
        set_to(LAST, [4, 20], 2.0, tokens=[0, -1]),  # 20 subtracts from dimension 20 - 16 = 4
        scale(LAST, 5, 3.0, tokens=1),
        steer(LAST, [6, 22, 7], 5.0, tokens=[2]),  # 22 subtracts from dimension 6 what 6 adds
    ]
    expected = plain[LAST].output.clone()
    expected[:, :, 3].clamp_(max=0)  # its positive part is gone
    expected[:, [0, 5], 4] = 0.0  # 2 - 2
    expected[:, 1, 5] = torch.where(expected[:, 1, 5] > 0, 3 * expected[:, 1, 5], expected[:, 1, 5])
    expected[:, 2, 7] += 5.0
    _, acts = run(model, tokens, *changes)
    torch.testing.assert_close(acts[LAST].output, expected)
    code = plain[LAST].c.clone()
    code[:, :, 3] = 0.0
    code[:, [0, 5], 4] = code[:, [0, 5], 20] = 2.0
    code[:, 1, 5] *= 3
    assert torch.equal(acts[LAST].c, code)
    assert torch.equal(acts[LAST].input, plain[LAST].input)


def test_of_two_values_the_later_holds_and_factors_multiply(tiny_model: Any, tokens: Tensor):
    model = identity_model(tiny_model)
    _, acts = run(model, tokens, set_to(LAST, 1, 2.0), set_to(LAST, 1, 4.0), scale(LAST, 1, 0.5))
    assert (acts[LAST].c[..., 1] == 2).all()  # 4 * 0.5
    twice = run(model, tokens, steer(LAST, 1, 1.0), steer(LAST, 1, 2.0))[1]
    once = run(model, tokens, steer(LAST, 1, 3.0))[1]
    torch.testing.assert_close(twice[LAST].output, once[LAST].output)


def test_indices_may_be_given_in_several_ways():
    for given in ([3, 1], (3, 1), torch.tensor([3, 1]), [3, 1, 3], torch.tensor([[3], [1]])):
        assert ablate(FIRST, given, given) == Intervention(FIRST, (3, 1), "set", 0.0, (3, 1))
    for given in (3, [3], torch.tensor(3)):
        assert scale(FIRST, given, 2) == Intervention(FIRST, (3,), "scale", 2.0)
    assert steer(FIRST, range(2), -1.5).elements == (0, 1)


# Laws, for all kinds


def test_all_kinds_are_tried():
    assert KINDS.keys() == PLACED.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_nothing(tlens_model: Any, tokens: Tensor, kind: str):
    model = model_with(tlens_model, kind)
    logits, acts = run(model, tokens)
    silent = [int((acts[p].c != 0).flatten(end_dim=-2).sum(0).argmin()) for p in (FIRST, LAST)]
    tokens_of_last = (acts[LAST].c[..., silent[1]] == 0).all(dim=0).nonzero().flatten()
    changes = [scale(FIRST, [0, 1], 1.0), steer(LAST, [0, 1], 0.0)]
    if len(tokens_of_last):  # a relu code may have no element that is silent on a token
        changes += [
            ablate(LAST, silent[1], tokens_of_last),
            scale(LAST, silent[1], 9.0, tokens_of_last),
        ]
    new_logits, new_acts = run(model, tokens, *changes)
    assert torch.equal(new_logits, logits)
    for position in (FIRST, LAST):
        assert torch.equal(new_acts[position].c, acts[position].c)
        assert torch.equal(new_acts[position].output, acts[position].output)


@pytest.mark.parametrize("kind", KINDS)
def test_ablating_is_scaling_by_zero_and_setting_to_zero(
    tlens_model: Any, tokens: Tensor, kind: str
):
    model = model_with(tlens_model, kind)
    logits, acts = run(model, tokens)
    active, _ = elements_of(acts[FIRST])
    ablated, after = run(model, tokens, ablate(FIRST, active))
    assert not torch.allclose(ablated, logits, atol=1e-5)
    assert (after[FIRST].c[..., active] == 0).all()
    for same in (scale(FIRST, active, 0.0), set_to(FIRST, active, 0.0)):
        assert torch.equal(run(model, tokens, same)[0], ablated)
    others = [j for j in range(acts[FIRST].c.shape[-1]) if j != active]
    assert torch.equal(after[FIRST].c[..., others], acts[FIRST].c[..., others])


@pytest.mark.parametrize("kind", KINDS)
def test_an_ablation_takes_what_the_element_wrote(tlens_model: Any, tokens: Tensor, kind: str):
    model = model_with(tlens_model, kind)
    _, acts = run(model, tokens)
    active, _ = elements_of(acts[FIRST])
    sae = model.saes.at(FIRST)
    alone = torch.zeros_like(acts[FIRST].c)
    alone[..., active] = acts[FIRST].c[..., active]
    written = sae.decode(alone) - sae.decode(torch.zeros_like(alone))
    for add_error, base in ((False, acts[FIRST].output), (True, acts[FIRST].target)):
        _, after = run(model, tokens, ablate(FIRST, active), add_error=add_error)
        torch.testing.assert_close(after[FIRST].output, base - written)
        assert written.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_steering_adds_a_direction_of_that_length(tlens_model: Any, tokens: Tensor, kind: str):
    model = model_with(tlens_model, kind)
    _, acts = run(model, tokens)
    _, after = run(model, tokens, steer(FIRST, 2, -3.0, tokens=[1]))
    change = after[FIRST].output - acts[FIRST].output
    torch.testing.assert_close(change[:, 1].norm(dim=-1), torch.full((2,), 3.0))
    torch.testing.assert_close(change[0, 1], -3 * model.saes.at(FIRST).dict_elements[2])
    assert (change[:, [0, 2, 3, 4, 5]] == 0).all()
    assert torch.equal(after[FIRST].c, acts[FIRST].c)


@pytest.mark.parametrize("kind", KINDS)
def test_with_errors_added_and_no_intervention_the_run_is_the_raw_one(
    tlens_model: Any, tokens: Tensor, kind: str
):
    model = model_with(tlens_model, kind)
    raw, raw_acts = model.forward_raw(tokens)
    logits, acts = run(model, tokens, add_error=True)
    assert raw is not None
    assert torch.equal(logits, raw)
    assert not torch.allclose(logits, run(model, tokens)[0], atol=1e-4)
    assert torch.equal(acts[LAST].output, raw_acts[LAST])
    generated = new_tokens(model, tokens, add_error=True)
    assert torch.equal(generated, new_tokens(model, tokens, sae_positions=[]))


def test_a_sequence_does_not_depend_on_its_batch(tlens_model: Any, tokens: Tensor):
    model = model_with(tlens_model, "topk")
    changes = [set_to(FIRST, 3, 4.0, tokens=-2), ablate(LAST, range(8))]
    logits, _ = run(model, tokens, *changes)
    for tokens_of_one, expected in zip(tokens, logits, strict=True):
        alone, _ = run(model, tokens_of_one[None], *changes)
        torch.testing.assert_close(alone[0], expected)
    # Nothing comes before the token that is changed first.
    before, _ = run(model, tokens)
    late, _ = run(model, tokens, set_to(FIRST, 3, 4.0, tokens=-2))
    torch.testing.assert_close(late[:, :4], before[:, :4])
    assert not torch.allclose(late[:, 4:], before[:, 4:], atol=1e-4)


def test_activations_with_heads_can_be_changed(tlens_model: Any, tokens: Tensor):
    position = "blocks.1.attn.hook_z"
    model = SAETransformer(tlens_model, position, dict_size_to_input_ratio=2.0)
    logits, acts = run(model, tokens)
    changed, after = run(model, tokens, steer(position, 0, 4.0), add_error=True)
    expected = acts[position].input + 4 * model.saes.at(position).dict_elements[0]
    torch.testing.assert_close(after[position].output, expected)
    assert not torch.allclose(changed, logits, atol=1e-4)


def test_saes_compute_changes_in_their_own_precision(tlens_model: Any, tokens: Tensor):
    tlens_model.to(torch.bfloat16)
    model = model_with(tlens_model, "topk").float()
    tlens_model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        _, acts = run(model, tokens, scale(FIRST, 0, 2.0), add_error=True)
        _, plain = run(model, tokens)
    assert acts[FIRST].output.dtype == torch.float32
    sae = model.saes.at(FIRST)
    difference = sae.decode(acts[FIRST].c) - sae.decode(plain[FIRST].c)
    expected = plain[FIRST].target + difference
    torch.testing.assert_close(acts[FIRST].output, expected, rtol=0, atol=1e-6)


# Generation


def continue_greedily(logits_of: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            tokens = torch.cat([tokens, logits_of(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    return tokens


POSITIONS = ["hook_embed", FIRST, "blocks.1.attn.hook_z", "blocks.2.hook_resid_post"]


@pytest.mark.slow
@pytest.mark.parametrize("uses_cache", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_generation_counts_tokens_from_the_start_of_the_prompt(
    tlens_model: Any, position: str, uses_cache: bool
):
    if uses_cache:
        tlens_model = caching_model(is_bridge=hasattr(tlens_model, "adapter"))
    model = SAETransformer(tlens_model, position, dict_size_to_input_ratio=2.0)
    prompt = torch.randint(64, (2, 4))
    for token in (1, 3, 6, [0, 4], [2, 3, 7], None):
        changes = [steer(position, [0, 1], 30.0, token), set_to(position, 5, -20.0, token)]

        def logits_of(some: Tensor, changes: list[Intervention] = changes) -> Tensor:
            n = some.shape[1]
            reached = [
                replace(one, tokens=one.tokens and tuple(t for t in one.tokens if t < n))
                for one in changes
            ]
            return model(some, interventions=reached)[0]

        expected = continue_greedily(logits_of, prompt)
        actual = new_tokens(model, prompt, interventions=changes, use_past_kv_cache=uses_cache)
        assert torch.equal(actual, expected), token


def caching_model(is_bridge: bool) -> Any:
    """A model whose blocks see one new token at a time.

    The tiny bridge's do not. `HookedTransformer` does with rotary positions what is right.
    """
    if is_bridge:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=3, n_head=2)
        config._attn_implementation = "eager"
        hugging_face = GPT2LMHeadModel(config).eval()
        model: Any = build_bridge_from_module(hugging_face, "GPT2LMHeadModel", hf_config=config)
    else:
        from conftest import TINY_MODEL
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        rotary = {**TINY_MODEL, "positional_embedding_type": "rotary", "rotary_dim": 8}
        model = HookedTransformer(HookedTransformerConfig(**rotary)).eval()
    lengths: list[int] = []
    with model.hooks(fwd_hooks=[(FIRST, lambda act, hook: lengths.append(act.shape[1]))]):
        model.generate(torch.zeros(1, 4, dtype=torch.long), verbose=False, **GREEDY)
    assert lengths == [4, 1, 1, 1, 1]
    return model


def test_changes_of_generated_tokens_show(tlens_model: Any):
    model = model_with(tlens_model, "topk")
    prompt = torch.randint(64, (2, 4))
    plain = new_tokens(model, prompt)
    for token in (3, 4, 6):
        changed = new_tokens(model, prompt, interventions=steer(LAST, 0, 90.0, token))
        # Token t is read before token t + 1 is written.
        assert torch.equal(changed[:, : token + 1], plain[:, : token + 1])
        assert not torch.equal(changed[:, token + 1], plain[:, token + 1])


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ablate(FIRST, []), "elements: is empty; name at least one"),
        (lambda: ablate(FIRST, 1, []), "tokens: is empty; name at least one"),
        (lambda: ablate(FIRST, 1.5), r"elements: 1.5 is not an index; give whole numbers"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: ablate(FIRST, [True]), r"elements: \[True\] is not an index"),
        (lambda: ablate(FIRST, "all"), "elements: 'all' is not an index"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: ablate(FIRST, [2**70]), r"elements: \[1180\d*\] is not an index"),
        (lambda: set_to(FIRST, 1, float("nan")), "set: nan is not a finite number; give one"),
        (lambda: scale(FIRST, 1, float("inf")), "scale: inf is not a finite number"),
        (lambda: steer(FIRST, 1, float("-inf")), "steer: -inf is not a finite number"),
    ],
)
def test_impossible_intervention_is_rejected(make: Callable[[], object], message: str):
    with pytest.raises(UserError, match=f"interventions: {message}"):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (ablate("hook_embed", 0), f"there is no SAE at 'hook_embed', only at {FIRST}, {LAST}"),
        (ablate(FIRST, 32), f"the SAE at '{FIRST}' has no element 32; give 0 to 31"),
        (ablate(FIRST, [3, -1]), "has no element -1; give 0 to 31"),
    ],
)
def test_intervention_that_fits_no_sae_is_rejected(
    tlens_model: Any, tokens: Tensor, change: Intervention, message: str
):
    model = model_with(tlens_model, "relu")
    for call in (model.forward, model.generate):
        with pytest.raises(UserError, match=f"interventions: .*{message}"):
            call(tokens, interventions=[change])


def test_intervention_on_an_sae_that_takes_no_part_is_rejected(tlens_model: Any, tokens: Tensor):
    model = model_with(tlens_model, "relu")
    for call in (model.forward, model.generate):
        with pytest.raises(UserError, match=f"the SAE at '{FIRST}' takes no part in this pass"):
            call(tokens, [LAST], interventions=[ablate(FIRST, 0)])


def test_tokens_outside_the_sequence_are_rejected(tlens_model: Any, tokens: Tensor):
    model = model_with(tlens_model, "relu")
    for outside in (6, -7):
        message = f"tokens: there is no token {outside} in a sequence of 6; give -6 to 5"
        with pytest.raises(UserError, match=message):
            model(tokens, interventions=[ablate(FIRST, 0, [0, outside])])
    # 6 tokens, and 4 of the 5 new ones are read.
    model.generate(tokens, interventions=[ablate(FIRST, 0, 9)], **GREEDY)
    with pytest.raises(UserError, match="there is no token 10 in a sequence of 10"):
        model.generate(tokens, interventions=[ablate(FIRST, 0, 10)], **GREEDY)
    with pytest.raises(UserError, match="tokens: -1 counts from the end of the sequence"):
        model.generate(tokens, interventions=[ablate(FIRST, 0, -1)], **GREEDY)


def test_given_activations_take_no_interventions(tlens_model: Any, tokens: Tensor):
    model = model_with(tlens_model, "relu")
    _, orig_acts = model.forward_raw(tokens)
    for options in ({"interventions": ablate(FIRST, 0)}, {"add_error": True}):
        with pytest.raises(
            UserError, match=r"orig_acts: leaves out the pass, .*; give tokens alone"
        ):
            model(None, orig_acts=orig_acts, **options)
