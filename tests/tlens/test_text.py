from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsify import SAETransformer, ablate, steer
from sparsify.settings.base_config import UserError
from sparsify.tlens.loading import BUNDLED_MODELS, build_bridge, load_hooked_model
from sparsify.tlens.native_model import load_native_model
from sparsify.tlens.tokenizers import load_tokenizer

pytestmark = pytest.mark.model

POSITION = "blocks.2.hook_resid_pre"
TEXTS = ["def main(", "a"]  # 4 tokens and 2, each with a BOS token
LONG = "x = 1\n" * 100  # 4 tokens a line and BOS, in a context of 256
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False}


@pytest.fixture(scope="module", params=["default", "bridge"])
def tiny_python(request: pytest.FixtureRequest) -> Any:
    """The bundled model, with its tokenizer, as either kind of TransformerLens's models."""
    if request.param == "default":
        return load_hooked_model("tiny-python", None, "folded")
    parts = load_native_model(BUNDLED_MODELS["tiny-python"])
    return build_bridge(*parts, load_tokenizer("tiny-python"), "folded")


@pytest.fixture
def model(tiny_python: Any) -> SAETransformer:
    return SAETransformer(tiny_python, POSITION, dict_size_to_input_ratio=2.0)


def test_a_text_is_read_as_its_tokens(model: SAETransformer, tiny_python: Any):
    tokens = tiny_python.to_tokens(TEXTS[0])
    assert torch.equal(model.to_tokens(TEXTS[0]), tokens)
    assert torch.equal(model(TEXTS[0])[0], model(tokens)[0])
    raw, _ = model.forward_raw(TEXTS[0])
    assert raw is not None
    assert torch.equal(raw, tiny_python(TEXTS[0]))
    _, acts = model.forward_raw(TEXTS[0], run_entire_model=False)
    assert acts[POSITION].shape[:2] == tokens.shape


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_texts_of_a_batch_do_not_see_padding(
    model: SAETransformer, padding_side: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(model.tokenizer, "padding_side", padding_side)
    logits, acts = model(TEXTS)
    assert logits.shape[:2] == acts[POSITION].c.shape[:2] == (2, 4)
    for text, batched in zip(TEXTS, logits, strict=True):
        alone = model(text)[0][0]
        torch.testing.assert_close(batched[: len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_prompts_of_different_length_are_continued_as_each_alone(model: SAETransformer):
    alone = [model.generate(text, **GREEDY) for text in TEXTS]
    assert model.generate(TEXTS, **GREEDY) == alone
    assert all(isinstance(text, str) for text in alone)
    change = steer(POSITION, [0, 1], 30.0)
    steered = [model.generate(text, interventions=change, **GREEDY) for text in TEXTS]
    assert model.generate(TEXTS, interventions=change, **GREEDY) == steered
    assert steered != alone


def test_places_in_prompts_of_different_length_are_rejected(model: SAETransformer):
    change = ablate(POSITION, 0, tokens=1)
    message = "interventions: tokens: are counted from .* have 4, 2 tokens; give prompts of one"
    with pytest.raises(UserError, match=message):
        model.generate(TEXTS, interventions=change, **GREEDY)
    continued = model.generate(["a", "b"], interventions=change, **GREEDY)
    alone = [model.generate(text, interventions=change, **GREEDY) for text in ("a", "b")]
    assert continued == alone


def test_prompts_with_padding_are_rejected(model: SAETransformer):
    padded = model.to_tokens(TEXTS)
    with pytest.raises(UserError, match=r"sequence 1 ends with padding; .* as a list of texts"):
        model.generate(padded, **GREEDY)
    model.generate(padded[:1], **GREEDY)
    model.generate(padded[:, :2], **GREEDY)


def test_a_long_text_is_not_cut_but_rejected(model: SAETransformer):
    tokens = model.to_tokens(LONG)
    n_pos = tokens.shape[1]
    assert n_pos > model.cfg.n_ctx
    assert model.to_string(tokens[0, 1:]) == "".join(model.to_str_tokens(LONG)[1:]) == LONG
    assert model.to_tokens(LONG, truncate=True).shape == (1, model.cfg.n_ctx)
    calls: list[Callable[[], object]] = [
        lambda: model(LONG),
        lambda: model.forward_raw([LONG, "a"]),
        lambda: model.run_with_cache(LONG),
    ]
    for call in calls:
        with pytest.raises(UserError, match=f"a sequence of {n_pos} does not fit"):
            call()
    with pytest.raises(UserError, match=r"tokens: a sequence of \d+ does not fit"):
        model.generate(LONG, max_new_tokens=1)


def test_names_of_tlens_models_work(model: SAETransformer, tiny_python: Any):
    tokens = model.to_tokens(TEXTS[0])
    assert model.cfg is tiny_python.cfg
    assert model.tokenizer is tiny_python.tokenizer
    assert model.hook_dict.keys() == tiny_python.hook_dict.keys()
    assert model.to_string(tokens) == tiny_python.to_string(tokens)
    assert model.to_single_token("def") == tiny_python.to_single_token("def")
    for some in (TEXTS[0], TEXTS, tokens, tokens[0]):
        assert model.to_str_tokens(some) == tiny_python.to_str_tokens(some)
    assert model.to_str_tokens("def", prepend_bos=False) == ["def"]
    assert torch.equal(model.to_tokens("def", prepend_bos=False), tokens[:, 1:2])
    with pytest.raises(AttributeError, match="to_string_tokens"):
        getattr(model, "to_string_tokens")  # noqa: B009 (which no type checker would let pass)


def test_cache_is_that_of_the_pass_with_saes(model: SAETransformer, tiny_python: Any):
    before, behind = "blocks.1.hook_resid_pre", "blocks.3.hook_resid_pre"
    names = [before, POSITION, behind]
    expected, acts = model(TEXTS[0], cache_positions=[before, behind])
    logits, cache = model.run_with_cache(TEXTS[0], names_filter=names)
    assert torch.equal(logits, expected)
    assert torch.equal(cache["resid_pre", 1], acts[before].input)  # TransformerLens's own class
    assert torch.equal(cache[POSITION], acts[POSITION].output)
    assert torch.equal(cache[behind], acts[behind].input)
    _, cache = model.run_with_cache(TEXTS[0], names_filter=lambda name: name == behind)
    assert list(cache) == [behind]
    assert len(model.run_with_cache(TEXTS[0])[1]) > 20
    raw, cache = model.run_with_cache(TEXTS[0], sae_positions=[], names_filter=behind)
    bare, expected = tiny_python.run_with_cache(TEXTS[0], names_filter=behind)
    assert torch.equal(raw, bare)
    assert torch.equal(cache[behind], expected[behind])
    assert torch.equal(model(TEXTS[0])[0], model(TEXTS[0])[0])  # no hook is left behind
    with pytest.raises(UserError, match=r"names_filter: .* did you mean 'blocks\.1\.hook_resid"):
        model.run_with_cache(TEXTS[0], names_filter="blocks.1.hook_resid_pr")


def test_text_for_a_model_without_a_tokenizer_is_rejected(tlens_model: Any):
    model = SAETransformer(tlens_model, POSITION, dict_size_to_input_ratio=2.0)
    for call in (model, model.forward_raw, model.generate, model.to_tokens, model.to_str_tokens):
        with pytest.raises(UserError, match="text: the model has no tokenizer; give token ids"):
            call("def")


def test_a_model_may_be_given_by_its_name():
    model = SAETransformer("tiny-python", POSITION, 4.0)
    expected = load_hooked_model("tiny-python", None, "folded")
    assert torch.equal(model(TEXTS[0], sae_positions=[])[0], expected(TEXTS[0]))
    with pytest.raises(UserError, match="cannot load 'tiny-pythn'; did you mean 'tiny-python'"):
        SAETransformer("tiny-pythn", POSITION, 4.0)
