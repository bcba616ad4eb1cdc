"""A loss term that is added as CONTRIBUTING.md says: a config, a field, a value, and this test."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from example_passes import leaf
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.nn import functional as F

from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.losses.terms import CoeffTerm
from sparsify.losses.total import total_loss
from sparsify.losses.values import Values, term_values
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.acts import CacheActs
from sparsify.settings.base_config import UserError
from sparsify.tlens.hook_names import HookNames
from sparsify.training.forward_passes import forward_passes
from sparsify.training.forward_plan import derive_plan

SAE, LATER = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_mid"


class DirectionLoss(CoeffTerm):
    """Mean of 1 - cosine between the spliced and the raw activation at hook points."""

    hook_positions: HookNames

    def raw_positions(self, sae_positions: Sequence[str]) -> list[str]:
        return self.hook_positions

    def spliced_positions(self, sae_positions: Sequence[str]) -> list[str]:
        return [position for position in self.hook_positions if position not in sae_positions]


class LossWithDirection(LossConfig):
    direction: DirectionLoss | None = None


@term_values.register
def direction_values(term: DirectionLoss, passes: Passes) -> Values:
    return {
        position: (
            1 - F.cosine_similarity(passes.arriving(position), passes.orig_acts[position], dim=-1)
        ).mean()
        for position in term.hook_positions
    }


def loss_at(*positions: str) -> LossConfig:
    return LossWithDirection.model_validate(
        {"direction": {"coeff": 0.5, "hook_positions": positions}}
    )


def test_its_value_by_hand():
    # Cosines of two tokens: (3 * 4 + 4 * 3) / 25 = 24 / 25, and 0.
    orig = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    passes = Passes({LATER: orig}, {LATER: CacheActs(leaf([[4, 3], [0, 2]]))})
    total, values = total_loss(loss_at(LATER), passes)
    assert {name: value.item() for name, value in values.items()} == {
        f"direction/{LATER}": pytest.approx((1 / 25 + 1) / 2)
    }
    assert total.item() == pytest.approx(0.5 * (1 / 25 + 1) / 2)


@pytest.mark.model
def test_its_plan_keeps_what_it_reads(tiny_model: Any):
    model = SAETransformer(tiny_model, SAE, dict_size_to_input_ratio=2.0)
    plan = derive_plan(model, loss_at(LATER))
    assert (plan.raw_positions, plan.spliced_positions) == ((LATER,), (LATER,))
    assert (plan.raw_stop, plan.spliced_stop) == (3, 3)
    assert not plan.is_local
    assert not plan.needs_logits


@pytest.mark.model
def test_its_gradient_reaches_the_sae_alone(tiny_model: Any):
    model = SAETransformer(tiny_model, SAE, dict_size_to_input_ratio=2.0)
    losses = loss_at(LATER)
    tokens = torch.randint(64, (2, 6))
    total, _ = total_loss(losses, forward_passes(model, tokens, derive_plan(model, losses)))
    total.backward()
    for parameter in model.saes.parameters():
        assert parameter.grad is not None
        assert parameter.grad.any()
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


@pytest.mark.model
@pytest.mark.parametrize(
    ("position", "message"),
    [
        ("blocks.2.hook_resid_mdi", "did you mean 'blocks.2.hook_resid_mid'"),
        ("blocks.0.hook_mlp_out", "does not lie behind the first SAE"),
    ],
)
def test_its_hook_points_are_checked(tiny_model: Any, position: str, message: str):
    model = SAETransformer(tiny_model, SAE, dict_size_to_input_ratio=2.0)
    with pytest.raises(UserError, match=rf"^loss\.direction\.hook_positions: .*{message}"):
        derive_plan(model, loss_at(position))


class WithoutValueLoss(CoeffTerm):
    pass


def test_a_term_without_a_value_is_one_clear_message():
    message = "WithoutValueLoss: no function computes this loss term; .*CONTRIBUTING.md"
    with pytest.raises(NotImplementedError, match=message):
        term_values(WithoutValueLoss(coeff=1.0), Passes({}, {}))


class ByTokenLoss(CoeffTerm):
    pass


class LossByToken(LossConfig):
    by_token: ByTokenLoss | None = None


@term_values.register
def by_token_values(term: ByTokenLoss, passes: Passes) -> dict[str, Tensor]:
    return {"": torch.zeros(2)}


def test_a_value_that_is_not_a_scalar_is_found_in_tests():
    with pytest.raises(TypeCheckError):
        total_loss(LossByToken(by_token=ByTokenLoss(coeff=1.0)), Passes({}, {}))
