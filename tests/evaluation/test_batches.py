from typing import Any

import pytest
import torch
from example_saes import FIRST, model_with

from sparsify import SAETransformer, ablate
from sparsify.evaluation.attribution import attribute_logit
from sparsify.evaluation.batches import read_batches, text_tokens, token_id
from sparsify.evaluation.evaluate import evaluate
from sparsify.evaluation.intervention_effect import intervention_effect
from sparsify.evaluation.suite import evaluate_suite
from sparsify.saes.config import TopKSAEConfig
from sparsify.settings.base_config import UserError
from sparsify.tlens.loading import load_hooked_model

pytestmark = pytest.mark.model

POSITION = "blocks.2.hook_resid_pre"
TEXT = "def main("
OTHER = "import os\n\nprint(os"


@pytest.fixture(scope="module")
def model() -> SAETransformer:
    """SAEs in the bundled model, which has a tokenizer."""
    torch.manual_seed(0)
    bundled = load_hooked_model("tiny-python", None, "folded")
    return SAETransformer(bundled, POSITION, sae=TopKSAEConfig(dict_size_to_input_ratio=1.0, k=8))


# Text


def test_a_text_is_evaluated_as_its_tokens(model: SAETransformer):
    tokens = [model.to_tokens(TEXT), model.to_tokens(OTHER)]
    expected = evaluate_suite(model, tokens)
    assert expected.evaluation.n_samples == 2
    assert evaluate(model, [TEXT, tokens[1]]) == expected.evaluation
    assert evaluate_suite(model, [TEXT, OTHER]).metrics() == expected.metrics()
    assert evaluate(model, TEXT).n_tokens == tokens[0].shape[1]


def test_interventions_are_measured_on_a_text_as_on_its_tokens(model: SAETransformer):
    change = ablate(POSITION, range(192))
    expected = intervention_effect(model, [model.to_tokens(TEXT)], change)
    assert expected.kl > 0
    assert intervention_effect(model, iter([TEXT]), change) == expected
    assert intervention_effect(model, TEXT, change) == expected


def test_a_logit_is_attributed_by_the_texts_of_tokens(model: SAETransformer):
    name, colon = (int(model.to_tokens(text)[0, -1]) for text in ("self", ":"))
    expected = attribute_logit(model, model.to_tokens(TEXT), name, minus=colon)
    found = attribute_logit(model, TEXT, "self", minus=":")
    assert found.logit == expected.logit
    assert found.top(5) == expected.top(5)
    assert attribute_logit(model, TEXT, name).logit != expected.logit


def test_a_token_is_its_id_or_its_text(model: SAETransformer):
    assert token_id(model, 487, "vocab_id") == 487
    assert token_id(model, "def", "vocab_id") == int(model.to_tokens("def")[0, -1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def main", r"vocab_id: 'def main' is 2 tokens, \['def', ' main'\]; give the text or"),
        ("", r"vocab_id: '' is 0 tokens, \[\]"),
    ],
)
def test_a_text_that_is_not_one_token_has_no_logit(model: SAETransformer, text: str, message: str):
    with pytest.raises(UserError, match=message):
        attribute_logit(model, TEXT, text)


def test_a_text_is_never_cut_off(model: SAETransformer):
    long = "x = 1\n" * 1000
    n = text_tokens(model, long, "batches").shape[1]
    assert n > 1000
    message = f"a sequence of {n} does not fit into the model's context"
    with pytest.raises(UserError, match=message):
        evaluate(model, [long])
    with pytest.raises(UserError, match=message):
        attribute_logit(model, long, "x")


# Refusals


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (["def"], "batches: is text, and the model has no tokenizer; give token ids"),
        ("def", "batches: is text, and the model has no tokenizer"),
        ([torch.zeros(3, dtype=torch.long)], r"batches: a batch of shape \(3,\); give a list"),
        (torch.zeros(2, 3, dtype=torch.long), r"batches: a batch of shape \(3,\); give a list"),
        ([["def"]], "batches: one is a list of texts, whose padding would count; give each text"),
        ([{"input_ids": [1, 2]}], "batches: a dict of this content holds no token ids"),
        ([[1, 2, 3]], r"batches: a batch of shape \(3,\); give a list of batches, each a text or"),
        ([torch.zeros(1, 1, dtype=torch.long)], "a sequence of 1 tokens has no next token"),
    ],
)
def test_what_is_not_a_batch_is_refused(tiny_model: Any, batches: Any, message: str):
    model = model_with(tiny_model, "relu")
    with pytest.raises(ValueError, match=message):
        list(read_batches(model, batches))
    if isinstance(batches, str):
        with pytest.raises(UserError, match=message):
            intervention_effect(model, batches, ablate(FIRST, 0))
