import math
from typing import get_args

import pytest
import torch
from example_passes import (
    FIRST,
    LATER,
    SECOND,
    floats,
    leaf,
    one_token_passes,
    sae_acts,
    two_token_passes,
)
from torch import Tensor

from sparsify.kernels.reference import full_cross_entropy
from sparsify.kernels.unembedding import Unembedding
from sparsify.losses.code_terms import SparsityLoss
from sparsify.losses.kept import NO_TARGET
from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.losses.terms import (
    InToOrigLoss,
    LogitsKLLoss,
    LossTerm,
    NextTokenCELoss,
    OutToInLoss,
    OutToOrigLoss,
)
from sparsify.losses.values import term_values
from sparsify.saes.acts import CacheActs, SAEActs
from sparsify.saes.jumprelu import JumpReLUSAE


@pytest.fixture
def passes() -> Passes:
    return one_token_passes()


@pytest.fixture
def two_tokens() -> Passes:
    return two_token_passes()


@pytest.mark.parametrize("name", LossConfig.model_fields)
def test_each_term_has_a_value(name: str):
    term, _ = get_args(LossConfig.model_fields[name].annotation)
    assert term_values.dispatch(term) is not term_values.dispatch(LossTerm)


def test_sparsity_by_hand(passes: Passes):
    # |1| + |3| = 4 and 2, over d_act = 2
    assert floats(term_values(SparsityLoss(coeff=9.0), passes)) == {FIRST: 2.0, SECOND: 1.0}


def test_sparsity_uses_its_exponent(passes: Passes):
    # (1 + sqrt 3)^2 / 2 and 2 / 2
    values = term_values(SparsityLoss(coeff=9.0, p_norm=0.5), passes)
    assert floats(values) == pytest.approx({FIRST: (1 + 3**0.5) ** 2 / 2, SECOND: 1.0})


def test_out_to_in_by_hand(passes: Passes):
    # ((1-1)^2 + (3-1)^2) / 2 and ((3-0)^2 + (1-1)^2) / 2
    assert floats(term_values(OutToInLoss(coeff=9.0), passes)) == {FIRST: 2.0, SECOND: 4.5}


def test_out_to_orig_by_hand(passes: Passes):
    # ((1-1)^2 + (3-1)^2) / 2 and ((3-0)^2 + (1-2)^2) / 2
    assert floats(term_values(OutToOrigLoss(coeff=9.0), passes)) == {FIRST: 2.0, SECOND: 5.0}


def test_in_to_orig_by_hand(passes: Passes):
    # What the second SAE read: ((0-0)^2 + (1-2)^2) / 2; later: ((2-1)^2 + (1-0)^2) / 2
    term = InToOrigLoss(hook_positions=[SECOND, LATER], total_coeff=9.0)
    assert floats(term_values(term, passes)) == {SECOND: 0.5, LATER: 1.0}


def test_logits_kl_by_hand(passes: Passes):
    # p_orig = (1/2, 1/2), p_new = (1/4, 3/4): 1/2 log 2 + 1/2 log(2/3)
    values = term_values(LogitsKLLoss(coeff=9.0), passes)
    assert floats(values) == {"": pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))}


@pytest.mark.parametrize(
    ("penalty", "first", "second"),
    [
        # Of c / scale = c / 2, over both tokens: (1/2, 3/2) and none; 1 and 2.
        ("tanh", math.tanh(0.5) + math.tanh(1.5), math.tanh(1) + math.tanh(2)),
        ("log", math.log(1.5) + math.log(2.5), math.log(2) + math.log(3)),
    ],
)
def test_concave_penalties_by_hand(two_tokens: Passes, penalty: str, first: float, second: float):
    term = SparsityLoss.model_validate({"coeff": 9.0, "penalty": penalty, "scale": 2.0})
    # Mean of two tokens, over d_act = 2.
    assert floats(term_values(term, two_tokens)) == pytest.approx(
        {FIRST: first / 4, SECOND: second / 4}
    )


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [("tanh", 1 / math.cosh(1.5) ** 2), ("log", 1 / 2.5)],  # derivative at c / scale = 3 / 2
)
def test_concave_penalties_have_the_derivative_of_their_scale(
    two_tokens: Passes, penalty: str, expected: float
):
    term = SparsityLoss.model_validate({"coeff": 9.0, "penalty": penalty, "scale": 2.0})
    term_values(term, two_tokens)[FIRST].backward()
    grad = two_tokens.sae_acts[FIRST].c.grad
    assert grad is not None
    # 1/2 for the scale, 1/4 for two tokens of width 2.
    assert grad[0, 2].item() == pytest.approx(expected / 2 / 4)


def test_l0_penalty_and_its_threshold_gradient_by_hand():
    sae = JumpReLUSAE(2, 3, bandwidth=0.5, initial_threshold=1.0)
    with torch.no_grad():
        sae.log_threshold.copy_(torch.tensor([2.0, 1.0, 1.0]).log())
    pre_acts = leaf([[2.2, 0.5, 3.0], [1.9, 1.1, -1.0]])
    acts = SAEActs(torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2, 2), pre_acts=pre_acts)
    value = term_values(
        SparsityLoss(coeff=9.0, penalty="l0"), Passes({}, {FIRST: acts}, saes={FIRST: sae})
    )
    value[FIRST].backward()
    # Above their thresholds: 2.2 and 3; 1.1. So 3 of 2 tokens, over d_act = 2.
    assert value[FIRST].item() == pytest.approx(3 / 2 / 2)
    # Within 0.25 of the thresholds: 2.2, 1.9; 1.1; none. d L0 / d theta = -count / 0.5 / 2 / 2, and
    # theta times that for its logarithm.
    torch.testing.assert_close(sae.log_threshold.grad, torch.tensor([-2.0, -0.5, 0.0]))
    assert pre_acts.grad is None


def test_next_token_ce_by_hand(two_tokens: Passes):
    # The first token's next is 1, of probability 3/4; the last has none.
    value = term_values(NextTokenCELoss(coeff=9.0), two_tokens)
    assert floats(value) == {"": pytest.approx(math.log(4 / 3))}


def test_next_token_ce_is_that_of_full_logits_without_the_last_position():
    unembed = Unembedding(torch.randn(4, 9), torch.randn(9), torch.tanh)
    resid, tokens = torch.randn(3, 5, 4, requires_grad=True), torch.randint(9, (3, 5))
    next_tokens = torch.cat([tokens[:, 1:], torch.full((3, 1), NO_TARGET)], dim=1)
    passes = Passes({}, {}, new_resid=resid, unembed=unembed, next_tokens=next_tokens)
    value = term_values(NextTokenCELoss(coeff=1.0), passes)[""]
    expected = full_cross_entropy(resid[:, :-1], tokens[:, 1:], unembed)
    torch.testing.assert_close(value, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(v, resid) for v in (value, expected))
    torch.testing.assert_close(grad, expected_grad)
    assert not grad[:, -1].any()


def in_to_orig(new: list[list[float]], orig: list[list[float]]) -> tuple[Tensor, Tensor]:
    """The normalised error, and what the spliced pass's activation gets of it."""
    acts = CacheActs(leaf(new))
    passes = Passes({SECOND: leaf(orig)}, {SECOND: acts})
    term = InToOrigLoss(hook_positions=[SECOND], total_coeff=9.0, normalised=True)
    value = term_values(term, passes)[SECOND]
    return value.detach(), torch.autograd.grad(value, acts.input)[0]


def test_normalised_in_to_orig_by_hand():
    # Mean (1, 0), so the variance is 1 + 1 = 2; the error is 1.
    value, grad = in_to_orig(new=[[0, 1], [2, 0]], orig=[[0, 0], [2, 0]])
    assert value.item() == pytest.approx(0.5)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 1.0], [0.0, 0.0]]))  # 2 * error / 2


def test_always_predicting_the_mean_has_normalised_error_one():
    assert in_to_orig(new=[[1, 3]] * 3, orig=[[0, 3], [2, 0], [1, 6]])[0].item() == pytest.approx(1)


@pytest.mark.parametrize("row", [[1.0, 1.0], [0.123, 5.7]])  # the latter's mean is rounded
def test_normalised_error_is_zero_with_no_gradient_if_the_target_does_not_vary(row: list[float]):
    value, grad = in_to_orig(new=[[0, 1], [2, 0], [1, 1]], orig=[row] * 3)
    assert value == 0
    assert not grad.any()


def test_in_to_orig_at_a_transcoder_is_about_where_it_writes():
    acts = sae_acts(input=[[9, 9, 9]], c=[[1]], output=[[5, 5]], replaced=[[1, 3]])
    passes = Passes({SECOND: leaf([[0, 1]])}, {SECOND: acts})
    value = term_values(InToOrigLoss(hook_positions=[SECOND], total_coeff=9.0), passes)[SECOND]
    assert value.item() == pytest.approx((1 + 4) / 2)  # what stood there, against the raw
