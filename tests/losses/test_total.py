import math
from dataclasses import replace

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

from sparsify.kernels.unembedding import Unembedding
from sparsify.losses.code_terms import SparsityLoss
from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.losses.terms import (
    InToOrigLoss,
    LogitsKLLoss,
    OutToInLoss,
    OutToOrigLoss,
)
from sparsify.losses.total import total_loss
from sparsify.saes.acts import SAEActs


@pytest.fixture
def passes() -> Passes:
    return one_token_passes()


@pytest.fixture
def two_tokens() -> Passes:
    return two_token_passes()


def test_total_is_the_weighted_sum_and_values_are_not_weighted(passes: Passes):
    losses = LossConfig(
        sparsity=SparsityLoss(coeff=0.1),
        in_to_orig=InToOrigLoss(hook_positions=[SECOND, LATER], total_coeff=10.0),
        out_to_orig=OutToOrigLoss(coeff=0.01),
        out_to_in=OutToInLoss(coeff=0.001),
        logits_kl=LogitsKLLoss(coeff=100.0),
    )
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    total, values = total_loss(losses, passes)
    assert floats(values) == pytest.approx(
        {
            f"sparsity/{FIRST}": 2.0,
            f"sparsity/{SECOND}": 1.0,
            f"in_to_orig/{SECOND}": 0.5,
            f"in_to_orig/{LATER}": 1.0,
            f"out_to_orig/{FIRST}": 2.0,
            f"out_to_orig/{SECOND}": 5.0,
            f"out_to_in/{FIRST}": 2.0,
            f"out_to_in/{SECOND}": 4.5,
            "logits_kl": kl,
        }
    )
    # 0.1 * (2 + 1) + 10/2 * (0.5 + 1) + 0.01 * (2 + 5) + 0.001 * (2 + 4.5) + 100 * kl
    assert total.item() == pytest.approx(0.3 + 7.5 + 0.07 + 0.0065 + 100 * kl)
    assert total.shape == ()
    assert not any(value.requires_grad for value in values.values())


def test_out_to_in_trains_what_comes_before_the_sae(passes: Passes):
    total_loss(LossConfig(out_to_in=OutToInLoss(coeff=1.0)), passes)[0].backward()
    acts = passes.sae_acts[SECOND]
    torch.testing.assert_close(acts.output.grad, torch.tensor([[3.0, 0.0]]))
    torch.testing.assert_close(acts.input.grad, torch.tensor([[-3.0, 0.0]]))


@pytest.mark.parametrize(
    "losses",
    [
        LossConfig(in_to_orig=InToOrigLoss(hook_positions=[LATER], total_coeff=1.0)),
        LossConfig(out_to_orig=OutToOrigLoss(coeff=1.0)),
        LossConfig(logits_kl=LogitsKLLoss(coeff=1.0)),
    ],
    ids=lambda losses: next(iter(losses.terms())),
)
def test_the_raw_pass_gets_no_gradients(passes: Passes, losses: LossConfig):
    assert passes.orig_resid is not None
    raw = [*passes.orig_acts.values(), passes.orig_resid]
    for activation in raw:
        activation.requires_grad_()
    total_loss(losses, passes)[0].backward()
    assert all(activation.grad is None for activation in raw)


def test_a_zero_coefficient_logs_without_training(passes: Passes):
    kl_only = LossConfig(logits_kl=LogitsKLLoss(coeff=1.0))
    with_zero = LossConfig(logits_kl=LogitsKLLoss(coeff=1.0), out_to_in=OutToInLoss(coeff=0.0))
    total, values = total_loss(with_zero, passes)
    total.backward()
    assert floats(values)[f"out_to_in/{SECOND}"] == 4.5
    assert passes.sae_acts[SECOND].output.grad is None
    torch.testing.assert_close(total, total_loss(kl_only, passes)[0])


def test_two_micro_batches_give_the_gradient_of_one_batch():
    unembed = Unembedding(torch.randn(4, 9), torch.randn(9))
    losses = LossConfig.model_validate(
        {"sparsity": {"coeff": 0.3}, "out_to_in": {"coeff": 0.2}, "logits_kl": {"coeff": 1.0}}
    )
    read, orig_resid = torch.randn(8, 3, 4), torch.randn(8, 3, 4)
    weight = torch.randn(4, 4, requires_grad=True)

    def loss_of(rows: slice) -> Tensor:
        c = (read[rows] @ weight).relu()
        acts = SAEActs(input=read[rows], c=c, output=c)
        passes = Passes({}, {FIRST: acts}, orig_resid[rows], orig_resid[rows] + c, unembed)
        return total_loss(losses, passes)[0]

    (whole,) = torch.autograd.grad(loss_of(slice(0, 8)), weight)
    halves = (loss_of(slice(0, 4)) + loss_of(slice(4, 8))) / 2
    torch.testing.assert_close(torch.autograd.grad(halves, weight)[0], whole)


def test_a_spliced_pass_without_saes_has_a_total(passes: Passes):
    without = Passes({LATER: passes.orig_acts[LATER]}, {LATER: passes.new_acts[LATER]})
    losses = LossConfig.model_validate(
        {"sparsity": {"coeff": 1.0}, "in_to_orig": {"hook_positions": LATER, "total_coeff": 2.0}}
    )
    total, values = total_loss(losses, without)
    assert floats(values) == {f"in_to_orig/{LATER}": 1.0}
    assert total.item() == 2.0


BALANCED = {"coeff": 0.5, "balance_with": "out_to_in"}


def test_balanced_kl_by_hand(two_tokens: Passes):
    losses = LossConfig.model_validate({"logits_kl": BALANCED, "out_to_in": {"coeff": 0.5}})
    kl = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2  # of two tokens, the other's is 0
    mse = (4 + 4) / 4 + (9 + 4) / 4
    total, values = total_loss(losses, two_tokens)
    assert values["logits_kl"].item() == pytest.approx(kl)
    assert values["logits_kl_balance"].item() == pytest.approx(mse / kl)
    assert total.item() == pytest.approx(0.5 * (mse + mse))


def test_a_kl_is_balanced_with_the_mean_of_downstream_errors(two_tokens: Passes):
    # As much as they count in the loss: at two hook points the coefficient is for their mean.
    downstream = {"hook_positions": [FIRST, SECOND], "total_coeff": 0.5}
    balanced = {"coeff": 0.5, "balance_with": "in_to_orig"}
    losses = LossConfig.model_validate({"logits_kl": balanced, "in_to_orig": downstream})
    orig = {name: torch.zeros_like(acts.input) for name, acts in two_tokens.sae_acts.items()}
    total, values = total_loss(losses, replace(two_tokens, orig_acts=orig))
    error = (values[f"in_to_orig/{FIRST}"] + values[f"in_to_orig/{SECOND}"]) / 2
    assert error > 0
    assert total.item() == pytest.approx(0.5 * (error + error).item())


def test_balanced_kl_has_the_gradients_of_the_paper(two_tokens: Passes):
    leaves = [
        two_tokens.new_resid,
        two_tokens.sae_acts[FIRST].output,
        two_tokens.sae_acts[SECOND].output,
    ]
    kl = total_loss(LossConfig.model_validate({"logits_kl": {"coeff": 1.0}}), two_tokens)[0]
    mse = total_loss(LossConfig.model_validate({"out_to_in": {"coeff": 1.0}}), two_tokens)[0]
    alpha = (mse / (kl + 1e-8)).detach()
    expected = torch.autograd.grad(0.5 * (alpha * kl + mse), leaves)
    losses = LossConfig.model_validate({"logits_kl": BALANCED, "out_to_in": {"coeff": 0.5}})
    torch.testing.assert_close(
        torch.autograd.grad(total_loss(losses, two_tokens)[0], leaves), expected
    )
    assert all(grad.any() for grad in expected)


def test_a_kl_of_zero_is_balanced_by_a_finite_number(two_tokens: Passes):
    losses = LossConfig.model_validate({"logits_kl": BALANCED, "out_to_in": {"coeff": 0.0}})
    same = Passes({}, two_tokens.new_acts, torch.zeros(2, 2), torch.zeros(2, 2), two_tokens.unembed)
    total, values = total_loss(losses, same)
    assert total == 0
    assert values["logits_kl_balance"].item() == pytest.approx(5.25 / 1e-8)


def test_a_kl_that_rounding_put_below_zero_is_balanced_as_zero(
    two_tokens: Passes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sparsify.losses.values.chunked_kl", lambda *_: torch.tensor(-1e-7))
    losses = LossConfig.model_validate({"logits_kl": BALANCED, "out_to_in": {"coeff": 0.0}})
    _, values = total_loss(losses, two_tokens)
    assert values["logits_kl_balance"].item() == pytest.approx(5.25 / 1e-8)


def test_errors_of_other_outputs_are_added_with_their_weights(two_tokens: Passes):
    losses = LossConfig.model_validate(
        {"sparsity": {"coeff": 10.0}, "out_to_in": {"coeff": 0.5}, "logits_kl": {"coeff": 2.0}}
    )
    acts = sae_acts(input=[[0, 0], [0, 0]], c=[[1, 0, 3], [0, 0, 0]], output=[[2, 2], [0, 0]])
    one = Passes({}, {FIRST: acts}, two_tokens.orig_resid, torch.zeros(2, 2), two_tokens.unembed)
    other = Passes(
        {},
        {FIRST: acts},
        two_tokens.orig_resid,
        leaf([[0, 0], [math.log(3), 0]]),
        two_tokens.unembed,
    )
    total, values = total_loss(losses, replace(two_tokens, others=((0.25, one), (3.0, other))))
    kl = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    # out_to_in of both is (4 + 4) / 4 = 2. The sparsity is that of the code alone.
    expected = total_loss(losses, two_tokens)[0].item() + 0.25 * (1 + 0) + 3 * (1 + 2 * kl)
    assert total.item() == pytest.approx(expected)
    assert floats(values)[f"other_outputs/out_to_in/{FIRST}"] == 2
    assert floats(values)["other_outputs/logits_kl"] == pytest.approx(kl)
    assert f"other_outputs/sparsity/{FIRST}" not in values
