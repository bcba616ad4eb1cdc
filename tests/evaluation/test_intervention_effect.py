from typing import Any

import pytest
import torch
from example_saes import FIRST, LAST, model_with
from torch import Tensor
from torch.nn import functional as F

from sparsify import SAETransformer, ablate, set_to, steer
from sparsify.evaluation.evaluate import evaluate
from sparsify.evaluation.intervention_effect import InterventionEffect, intervention_effect
from sparsify.settings.base_config import UserError
from sparsify.splicing.interventions import Intervention

pytestmark = pytest.mark.model

CHANGES = [set_to(FIRST, [2, 3], 3.0, tokens=[1, -1]), ablate(LAST, range(16))]


@pytest.fixture(params=["tiny_model", "tiny_bridge"])
def model(request: pytest.FixtureRequest) -> SAETransformer:
    return model_with(request.getfixturevalue(request.param), "relu")


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (5, 7))


def numbers(effect: InterventionEffect) -> dict[str, float]:
    return vars(effect)


@torch.no_grad()
def of_logits(
    model: SAETransformer, tokens: Tensor, changes: list[Intervention], add_error: bool
) -> dict[str, float]:
    """The same from whole logits."""
    raw, _ = model.forward_raw(tokens)
    passes = {
        "raw": raw,
        "spliced": model(tokens, add_error=add_error)[0],
        "intervened": model(tokens, interventions=changes, add_error=add_error)[0],
    }
    log_probs = {name: logits.log_softmax(dim=-1) for name, logits in passes.items()}
    ce = {
        name: F.nll_loss(rows[:, :-1].flatten(end_dim=1), tokens[:, 1:].flatten()).item()
        for name, rows in log_probs.items()
    }

    def kl(name: str) -> float:
        p, q = log_probs[name], log_probs["intervened"]
        return (p.exp() * (p - q)).sum(dim=-1).mean().item()

    return {
        "n_tokens": 35,  # 5 * 7
        "n_predictions": 30,  # 5 * 6
        "ce_loss_raw": ce["raw"],
        "ce_loss": ce["spliced"],
        "ce_loss_intervened": ce["intervened"],
        "kl": kl("spliced"),
        "kl_raw": kl("raw"),
    }


@pytest.mark.parametrize("add_error", [False, True])
def test_effect_is_that_on_the_logits(model: SAETransformer, tokens: Tensor, add_error: bool):
    effect = intervention_effect(model, [tokens], CHANGES, add_error=add_error)
    expected = of_logits(model, tokens, CHANGES, add_error)
    assert numbers(effect) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert effect.ce_loss_increase == effect.ce_loss_intervened - effect.ce_loss
    assert effect.kl > 1e-3
    if add_error:
        assert effect.ce_loss == effect.ce_loss_raw
        assert effect.kl == effect.kl_raw
    else:
        assert effect.kl_raw != pytest.approx(effect.kl, rel=0.01)


def test_neither_batches_nor_chunks_change_the_effect(model: SAETransformer, tokens: Tensor):
    expected = numbers(intervention_effect(model, [tokens], CHANGES))
    parts = intervention_effect(model, iter(tokens.split(2)), CHANGES, chunk_size=3)
    assert numbers(parts) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_what_changes_nothing_has_no_effect(model: SAETransformer, tokens: Tensor):
    effect = intervention_effect(model, [tokens], steer(FIRST, 0, 0.0))
    assert effect.ce_loss_increase == effect.kl == 0
    evaluation = evaluate(model, [tokens])
    assert effect.ce_loss_raw == pytest.approx(evaluation.ce_loss_raw)
    assert effect.ce_loss == pytest.approx(evaluation.ce_loss)
    assert effect.kl_raw == pytest.approx(evaluation.logits_kl)


def test_tokens_that_do_not_count_are_left_out(model: SAETransformer, tokens: Tensor):
    # Nothing before token 5 changes.
    change = steer(FIRST, 0, 9.0, tokens=5)
    early = torch.arange(7) < 5
    effect = intervention_effect(model, [tokens], change, kept=lambda some: early.expand_as(some))
    # 5 * 5, and 5 * 4: what follows the last does not count.
    assert (effect.n_tokens, effect.n_predictions) == (25, 20)
    assert effect.kl == pytest.approx(0, abs=1e-6)
    late = intervention_effect(model, [tokens], change, kept=lambda some: (~early).expand_as(some))
    assert (late.n_tokens, late.n_predictions) == (10, 5)  # the last has no next token
    assert late.kl > 1e-3


def test_model_is_left_as_it_was(model: SAETransformer, tokens: Tensor):
    model.train()
    before = model(tokens)[0]
    intervention_effect(model, [tokens], CHANGES)
    assert model.saes.at(FIRST).training
    assert torch.equal(model(tokens)[0], before)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ([], (2, 3), "interventions: there are none; give at least one"),
        (ablate("hook_embed", 0), (2, 3), "interventions: there is no SAE at 'hook_embed'"),
        (ablate(FIRST, 32), (2, 3), "has no element 32"),
        (ablate(FIRST, 0, 3), (2, 3), "there is no token 3 in a sequence of 3"),
        (ablate(FIRST, 0), (2, 17), "a sequence of 17 does not fit"),
        (ablate(FIRST, 0), (2, 1), "a sequence of 1 tokens has no next token"),
        (ablate(FIRST, 0), (0, 3), "batches: hold no tokens; give at least one"),
    ],
)
def test_impossible_request_is_rejected(
    tiny_model: Any, changes: Any, shape: tuple[int, int], message: str
):
    model = model_with(tiny_model, "relu")
    error = ValueError if "batches" in message or "sequence of 1 " in message else UserError
    with pytest.raises(error, match=message):
        intervention_effect(model, [torch.zeros(shape, dtype=torch.long)], changes)
