import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsify.kernels.reference import full_cross_entropy
from sparsify.kernels.unembedding import Unembedding
from sparsify.losses.code_terms import SparsityLoss
from sparsify.losses.loss import LossConfig, check_loss_suits_kind, total_loss
from sparsify.losses.passes import NO_TARGET, Passes
from sparsify.losses.terms import CoeffSchedule, InToOrigLoss, NextTokenCELoss
from sparsify.saes.acts import CacheActs, SAEActs
from sparsify.saes.config import CodebookSAEConfig, ReLUSAEConfig, SAEConfig, TopKSAEConfig
from sparsify.saes.jumprelu import JumpReLUSAE

FIRST, SECOND = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre"


def leaf(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, requires_grad=True)


def sae_acts(**values: list[list[float]]) -> SAEActs:
    return SAEActs(**{name: leaf(rows) for name, rows in values.items()})


def floats(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}


@pytest.fixture
def passes() -> Passes:
    """Two SAEs on activations of width 2, two tokens, and a vocabulary of two."""
    first = sae_acts(input=[[1, 1], [0, 0]], c=[[1, 0, 3], [0, 0, 0]], output=[[1, 3], [2, 0]])
    second = sae_acts(input=[[0, 1], [1, 0]], c=[[0, 2, 0], [0, 4, 0]], output=[[3, 1], [1, 2]])
    return Passes(
        orig_acts={},
        new_acts={FIRST: first, SECOND: second},
        orig_resid=torch.zeros(2, 2),
        new_resid=leaf([[0, math.log(3)], [0, 0]]),
        unembed=Unembedding(torch.eye(2)),
        next_tokens=torch.tensor([1, NO_TARGET]),
    )


@pytest.mark.parametrize(
    ("penalty", "first", "second"),
    [
        # Of c / scale = c / 2, over both tokens: (1/2, 3/2) and none; 1 and 2.
        ("tanh", math.tanh(0.5) + math.tanh(1.5), math.tanh(1) + math.tanh(2)),
        ("log", math.log(1.5) + math.log(2.5), math.log(2) + math.log(3)),
    ],
)
def test_concave_penalties_by_hand(passes: Passes, penalty: str, first: float, second: float):
    term = SparsityLoss.model_validate({"coeff": 9.0, "penalty": penalty, "scale": 2.0})
    # Mean of two tokens, over d_act = 2.
    assert floats(term.calc(passes)) == pytest.approx({FIRST: first / 4, SECOND: second / 4})


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [("tanh", 1 / math.cosh(1.5) ** 2), ("log", 1 / 2.5)],  # derivative at c / scale = 3 / 2
)
def test_concave_penalties_have_the_derivative_of_their_scale(
    passes: Passes, penalty: str, expected: float
):
    term = SparsityLoss.model_validate({"coeff": 9.0, "penalty": penalty, "scale": 2.0})
    term.calc(passes)[FIRST].backward()
    grad = passes.sae_acts[FIRST].c.grad
    assert grad is not None
    # 1/2 for the scale, 1/4 for two tokens of width 2.
    assert grad[0, 2].item() == pytest.approx(expected / 2 / 4)


def test_l0_penalty_and_its_threshold_gradient_by_hand():
    sae = JumpReLUSAE(2, 3, bandwidth=0.5, initial_threshold=1.0)
    with torch.no_grad():
        sae.log_threshold.copy_(torch.tensor([2.0, 1.0, 1.0]).log())
    pre_acts = leaf([[2.2, 0.5, 3.0], [1.9, 1.1, -1.0]])
    acts = SAEActs(torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2, 2), pre_acts=pre_acts)
    value = SparsityLoss(coeff=9.0, penalty="l0").calc(Passes({}, {FIRST: acts}, saes={FIRST: sae}))
    value[FIRST].backward()
    # Above their thresholds: 2.2 and 3; 1.1. So 3 of 2 tokens, over d_act = 2.
    assert value[FIRST].item() == pytest.approx(3 / 2 / 2)
    # Within 0.25 of the thresholds: 2.2, 1.9; 1.1; none. d L0 / d theta = -count / 0.5 / 2 / 2, and
    # theta times that for its logarithm.
    torch.testing.assert_close(sae.log_threshold.grad, torch.tensor([-2.0, -0.5, 0.0]))
    assert pre_acts.grad is None


def test_next_token_ce_by_hand(passes: Passes):
    # The first token's next is 1, of probability 3/4; the last has none.
    value = NextTokenCELoss(coeff=9.0).calc(passes)
    assert floats(value) == {"": pytest.approx(math.log(4 / 3))}


def test_next_token_ce_is_that_of_full_logits_without_the_last_position():
    unembed = Unembedding(torch.randn(4, 9), torch.randn(9), torch.tanh)
    resid, tokens = torch.randn(3, 5, 4, requires_grad=True), torch.randint(9, (3, 5))
    next_tokens = torch.cat([tokens[:, 1:], torch.full((3, 1), NO_TARGET)], dim=1)
    passes = Passes({}, {}, new_resid=resid, unembed=unembed, next_tokens=next_tokens)
    value = NextTokenCELoss(coeff=1.0).calc(passes)[""]
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
    value = term.calc(passes)[SECOND]
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
    value = InToOrigLoss(hook_positions=[SECOND], total_coeff=9.0).calc(passes)[SECOND]
    assert value.item() == pytest.approx((1 + 4) / 2)  # what stood there, against the raw


BALANCED = {"coeff": 0.5, "balance_with": "out_to_in"}


def test_balanced_kl_by_hand(passes: Passes):
    losses = LossConfig.model_validate({"logits_kl": BALANCED, "out_to_in": {"coeff": 0.5}})
    kl = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2  # of two tokens, the other's is 0
    mse = (4 + 4) / 4 + (9 + 4) / 4
    total, values = total_loss(losses, passes)
    assert values["logits_kl"].item() == pytest.approx(kl)
    assert values["logits_kl_balance"].item() == pytest.approx(mse / kl)
    assert total.item() == pytest.approx(0.5 * (mse + mse))


def test_a_kl_is_balanced_with_the_mean_of_downstream_errors(passes: Passes):
    # As much as they count in the loss: at two hook points the coefficient is for their mean.
    downstream = {"hook_positions": [FIRST, SECOND], "total_coeff": 0.5}
    balanced = {"coeff": 0.5, "balance_with": "in_to_orig"}
    losses = LossConfig.model_validate({"logits_kl": balanced, "in_to_orig": downstream})
    orig = {name: torch.zeros_like(acts.input) for name, acts in passes.sae_acts.items()}
    total, values = total_loss(losses, replace(passes, orig_acts=orig))
    error = (values[f"in_to_orig/{FIRST}"] + values[f"in_to_orig/{SECOND}"]) / 2
    assert error > 0
    assert total.item() == pytest.approx(0.5 * (error + error).item())


def test_balanced_kl_has_the_gradients_of_the_paper(passes: Passes):
    leaves = [passes.new_resid, passes.sae_acts[FIRST].output, passes.sae_acts[SECOND].output]
    kl = total_loss(LossConfig.model_validate({"logits_kl": {"coeff": 1.0}}), passes)[0]
    mse = total_loss(LossConfig.model_validate({"out_to_in": {"coeff": 1.0}}), passes)[0]
    alpha = (mse / (kl + 1e-8)).detach()
    expected = torch.autograd.grad(0.5 * (alpha * kl + mse), leaves)
    losses = LossConfig.model_validate({"logits_kl": BALANCED, "out_to_in": {"coeff": 0.5}})
    torch.testing.assert_close(torch.autograd.grad(total_loss(losses, passes)[0], leaves), expected)
    assert all(grad.any() for grad in expected)


def test_a_kl_of_zero_is_balanced_by_a_finite_number(passes: Passes):
    losses = LossConfig.model_validate({"logits_kl": BALANCED, "out_to_in": {"coeff": 0.0}})
    same = Passes({}, passes.new_acts, torch.zeros(2, 2), torch.zeros(2, 2), passes.unembed)
    total, values = total_loss(losses, same)
    assert total == 0
    assert values["logits_kl_balance"].item() == pytest.approx(5.25 / 1e-8)


def test_a_kl_that_rounding_put_below_zero_is_balanced_as_zero(
    passes: Passes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sparsify.kernels.chunked.chunked_kl", lambda *_: torch.tensor(-1e-7))
    losses = LossConfig.model_validate({"logits_kl": BALANCED, "out_to_in": {"coeff": 0.0}})
    _, values = total_loss(losses, passes)
    assert values["logits_kl_balance"].item() == pytest.approx(5.25 / 1e-8)


def test_errors_of_other_outputs_are_added_with_their_weights(passes: Passes):
    losses = LossConfig.model_validate(
        {"sparsity": {"coeff": 10.0}, "out_to_in": {"coeff": 0.5}, "logits_kl": {"coeff": 2.0}}
    )
    acts = sae_acts(input=[[0, 0], [0, 0]], c=[[1, 0, 3], [0, 0, 0]], output=[[2, 2], [0, 0]])
    one = Passes({}, {FIRST: acts}, passes.orig_resid, torch.zeros(2, 2), passes.unembed)
    other = Passes(
        {}, {FIRST: acts}, passes.orig_resid, leaf([[0, 0], [math.log(3), 0]]), passes.unembed
    )
    total, values = total_loss(losses, replace(passes, others=((0.25, one), (3.0, other))))
    kl = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    # out_to_in of both is (4 + 4) / 4 = 2. The sparsity is that of the code alone.
    expected = total_loss(losses, passes)[0].item() + 0.25 * (1 + 0) + 3 * (1 + 2 * kl)
    assert total.item() == pytest.approx(expected)
    assert floats(values)[f"other_outputs/out_to_in/{FIRST}"] == 2
    assert floats(values)["other_outputs/logits_kl"] == pytest.approx(kl)
    assert f"other_outputs/sparsity/{FIRST}" not in values


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": {"coeff": 1, "scale": 2}}, r"scale \(2.0\) belongs to penalty tanh and log"),
        (
            {"sparsity": {"coeff": 1, "penalty": "tanh", "p_norm": 0.5}},
            r"p_norm \(0.5\) belongs to penalty p_norm, not to 'tanh'; remove it",
        ),
        (
            {"sparsity": {"coeff": 0, "target_l0": 9}, "out_to_in": {"coeff": 1}},
            r"coeff \(0\) is where the controller of target_l0 starts",
        ),
        ({"logits_kl": BALANCED}, "logits_kl.balance_with: out_to_in is null; set it"),
        ({"out_to_in": {"coeff": 1, "schedule": {}}}, "changes nothing; set warmup_samples"),
    ],
)
def test_bad_term_is_rejected(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        LossConfig.model_validate(fields)


RELU, TOPK = (
    ReLUSAEConfig(dict_size_to_input_ratio=2),
    TopKSAEConfig(dict_size_to_input_ratio=2, k=1),
)
CODEBOOK = CodebookSAEConfig(dict_size_to_input_ratio=2, k=1)


@pytest.mark.parametrize(
    ("fields", "sae", "message"),
    [
        ({"sparsity": {"coeff": 1}}, CODEBOOK, "kind 'codebook' have nothing to penalise"),
        ({"aux_k": {"coeff": 1}}, CODEBOOK, "kind 'codebook' have no pre-activations"),
        (
            {"sparsity": {"coeff": 1, "target_l0": 9}},
            TOPK,
            r"target_l0 \(9\): saes.k \(1\) decides",
        ),
        ({"sparsity": {"coeff": 1, "penalty": "l0"}}, RELU, r"\(l0\) has no gradient in SAEs of k"),
        ({"pre_act": {"coeff": 1}}, RELU, "belongs to kind jumprelu, not to 'relu'"),
    ],
)
def test_a_term_without_meaning_for_the_kind_is_rejected(
    fields: dict[str, object], sae: SAEConfig, message: str
):
    losses = LossConfig.model_validate(fields)
    with pytest.raises(ValueError, match=message):
        check_loss_suits_kind(losses, sae)


def test_coefficient_schedule_by_hand():
    schedule = CoeffSchedule(warmup_samples=10, end_factor=0.2)
    factors = [schedule.factor(n_done, 110) for n_done in (0, 5, 10, 60, 110, 200)]
    assert factors == pytest.approx([0, 0.5, 1, 1 - 0.8 / 2, 0.2, 0.2])
