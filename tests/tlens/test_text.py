from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify import SAETransformer, ablate, steer
from sparsify.evaluation.attribution import attribute_logit
from sparsify.evaluation.evaluate import evaluate
from sparsify.evaluation.intervention_effect import intervention_effect
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


def continued(model: SAETransformer, prompts: Any, **options: Any) -> Tensor:
    """Tokens of prompts and what follows."""
    found = model.generate(prompts, return_type="tokens", **options, **GREEDY)
    assert isinstance(found, Tensor)
    return found


PROMPTS = [*TEXTS, "import os\n\nclass A", ""]  # the last is BOS alone
CONTINUED = 3


@pytest.fixture(params=["<|endoftext|>", "!"])  # as BOS, or another
def pad_token(request: pytest.FixtureRequest, model: SAETransformer) -> Iterator[str]:
    before = model.tokenizer.pad_token
    model.tokenizer.pad_token = request.param
    yield request.param
    model.tokenizer.pad_token = before


@pytest.mark.usefixtures("pad_token")
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padded_tokens_are_continued_as_each_prompt_alone(model: SAETransformer, padding_side: str):
    change = steer(POSITION, [0, 1], 30.0)
    padded = model.to_tokens(PROMPTS, padding_side=padding_side)
    found = continued(model, padded, interventions=change)
    pad = model.tokenizer.pad_token_id
    assert found.shape == (4, padded.shape[1] + CONTINUED)
    for prompt, row in zip(PROMPTS, found, strict=True):
        tokens = model.to_tokens(prompt)
        alone = continued(model, tokens, interventions=change)[0]
        logits = model(alone[:-1], interventions=change)[0][0, -CONTINUED:]
        assert alone[-CONTINUED:].tolist() == logits.argmax(dim=-1).tolist()
        n_pad = len(row) - len(alone)
        assert row[n_pad:].tolist() == alone.tolist()
        assert row[:n_pad].tolist() == [pad] * n_pad
    assert len({tuple(row[-CONTINUED:].tolist()) for row in found}) > 1
    assert model.tokenizer.padding_side == "right"


def test_a_prompt_may_end_with_the_padding_token(model: SAETransformer):
    text = "x = 1\n<|endoftext|>"
    tokens = model.to_tokens(text)
    assert tokens[0, -1] == model.tokenizer.pad_token_id
    found = continued(model, tokens)
    expected = model(found[:, :-1])[0][0, -CONTINUED:].argmax(dim=-1)
    assert found[0, -CONTINUED:].tolist() == expected.tolist()
    assert torch.equal(continued(model, text), found)


def test_padding_without_bos_is_seen_too(model: SAETransformer):
    padded = model.to_tokens(["def main(", "import"], prepend_bos=False)
    found = continued(model, padded)
    for text, row in zip(["def main(", "import"], found, strict=True):
        alone = continued(model, model.to_tokens(text, prepend_bos=False))[0]
        assert row[-len(alone) :].tolist() == alone.tolist()
    mixed = padded.clone()
    mixed[0, 0] = model.tokenizer.bos_token_id
    with pytest.raises(UserError, match="tokens: some of the prompts begin with BOS and some do n"):
        model.generate(mixed, **GREEDY)


def test_places_in_padded_prompts_are_rejected(model: SAETransformer):
    change = ablate(POSITION, 0, tokens=1)
    with pytest.raises(UserError, match="the prompts have 4, 2 tokens; give prompts of one length"):
        model.generate(model.to_tokens(TEXTS), interventions=change, **GREEDY)


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


def tokens_readers(model: SAETransformer) -> list[Callable[[Any], Any]]:
    """Everything that takes token ids, each a function from them to a result."""
    return [
        lambda tokens: model(tokens)[0],
        lambda tokens: model.forward_raw(tokens)[0],
        lambda tokens: model.run_with_cache(tokens)[0],
        lambda tokens: model.generate(tokens, **GREEDY),
        lambda tokens: attribute_logit(model, tokens, 3).logit,
        lambda tokens: evaluate(model, [tokens]).metrics(),
        lambda tokens: intervention_effect(model, [tokens], ablate(LATE, 0)).kl_raw,
    ]


LATE = "blocks.1.hook_resid_pre"
IDS = [[1, 2, 60, 3, 5]]


@pytest.mark.parametrize(
    "convert",
    [
        lambda ids: ids,
        tuple,
        *(
            partial(torch.tensor, dtype=dtype)
            for dtype in (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16)
        ),
    ],
    ids=["lists", "tuple of lists", "int8", "int16", "int32", "uint8", "uint16"],
)
def test_token_ids_are_taken_as_what_they_are(tiny_model: Any, convert: Callable[[Any], Any]):
    model = SAETransformer(tiny_model, LATE, dict_size_to_input_ratio=2.0)
    given, expected = convert(IDS), torch.tensor(IDS)
    for read in tokens_readers(model):
        torch.testing.assert_close(read(given), read(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            torch.tensor([[1, -100, 3]]),
            r"-100, at \(0, 1\), is not a token id; the model's are 0 to",
        ),
        (
            torch.tensor([[1, 2, 64]]),
            r"64, at \(0, 2\), is not a token id; the model's are 0 to 63",
        ),
        (torch.tensor([[1.0, 2.0]]), "have type torch.float32, but token ids are whole numbers"),
        (torch.tensor([[True, False]]), "have type torch.bool, but token ids are whole numbers"),
        (
            [[1, 2], [3]],
            "a list of this content holds no token ids; give text, or whole numbers of",
        ),
        ([], "the list is empty; give at least one|whole numbers"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"shape \(1, 2, 3\)"),
        (torch.tensor(3), r"shape \(\)"),
        ([[1] * 17], "a sequence of 1[79] does not fit into the model's context of 16"),
    ],
)
def test_what_is_not_a_token_id_is_refused(tiny_model: Any, given: Any, message: str):
    model = SAETransformer(tiny_model, LATE, dict_size_to_input_ratio=2.0)
    for read in tokens_readers(model):
        with pytest.raises(UserError, match=f"^(tokens|batches): .*{message}"):
            read(given)


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


@pytest.mark.parametrize("n", [0, -1])
def test_a_text_is_continued_by_one_token_at_least(model: SAETransformer, n: int):
    with pytest.raises(UserError, match=f"max_new_tokens: {n} adds none; give 1 or more"):
        model.generate("def", max_new_tokens=n)


def test_texts_and_ids_do_not_mix(model: SAETransformer):
    with pytest.raises(UserError, match=r"a list of texts also holds something else \(int\)"):
        model.generate(["def", 1])
