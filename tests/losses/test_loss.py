import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from sparsify.kernels.unembedding import Unembedding
from sparsify.losses.loss import (
    InToOrigLoss,
    LogitsKLLoss,
    LossConfig,
    OutToInLoss,
    OutToOrigLoss,
    SparsityLoss,
    total_loss,
)
from sparsify.losses.passes import Passes
from sparsify.saes.acts import CacheActs, SAEActs

FIRST, SECOND, LATER = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


@pytest.fixture
def passes() -> Passes:
    """Two SAEs on activations of width 2, a cached position, and a vocabulary of two tokens."""
    return Passes(
        orig_acts={
            FIRST: torch.tensor([[1.0, 1.0]]),
            SECOND: torch.tensor([[0.0, 2.0]]),
            LATER: torch.tensor([[1.0, 0.0]]),
        },
        new_acts={
            FIRST: sae_acts(input=[1.0, 1.0], c=[1.0, 0.0, 3.0], output=[1.0, 3.0]),
            SECOND: sae_acts(input=[0.0, 1.0], c=[0.0, 2.0, 0.0], output=[3.0, 1.0]),
            LATER: CacheActs(input=leaf([2.0, 1.0])),
        },
        orig_resid=torch.tensor([[0.0, 0.0]]),
        new_resid=leaf([0.0, math.log(3)]),
        unembed=Unembedding(torch.eye(2)),
    )


def leaf(values: list[float]) -> Tensor:
    return torch.tensor([values], requires_grad=True)


def sae_acts(**values: list[float]) -> SAEActs:
    return SAEActs(**{name: leaf(entries) for name, entries in values.items()})


def floats(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}


def test_sparsity_by_hand(passes: Passes):
    # |1| + |3| = 4 and 2, over d_act = 2
    assert floats(SparsityLoss(coeff=9.0).calc(passes)) == {FIRST: 2.0, SECOND: 1.0}


def test_sparsity_uses_its_exponent(passes: Passes):
    # (1 + sqrt 3)^2 / 2 and 2 / 2
    values = SparsityLoss(coeff=9.0, p_norm=0.5).calc(passes)
    assert floats(values) == pytest.approx({FIRST: (1 + 3**0.5) ** 2 / 2, SECOND: 1.0})


def test_out_to_in_by_hand(passes: Passes):
    # ((1-1)^2 + (3-1)^2) / 2 and ((3-0)^2 + (1-1)^2) / 2
    assert floats(OutToInLoss(coeff=9.0).calc(passes)) == {FIRST: 2.0, SECOND: 4.5}


def test_out_to_orig_by_hand(passes: Passes):
    # ((1-1)^2 + (3-1)^2) / 2 and ((3-0)^2 + (1-2)^2) / 2
    assert floats(OutToOrigLoss(coeff=9.0).calc(passes)) == {FIRST: 2.0, SECOND: 5.0}


def test_in_to_orig_by_hand(passes: Passes):
    # What the second SAE read: ((0-0)^2 + (1-2)^2) / 2; later: ((2-1)^2 + (1-0)^2) / 2
    term = InToOrigLoss(hook_positions=[SECOND, LATER], total_coeff=9.0)
    assert floats(term.calc(passes)) == {SECOND: 0.5, LATER: 1.0}


def test_logits_kl_by_hand(passes: Passes):
    # p_orig = (1/2, 1/2), p_new = (1/4, 3/4): 1/2 log 2 + 1/2 log(2/3)
    values = LogitsKLLoss(coeff=9.0).calc(passes)
    assert floats(values) == {"": pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))}


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
def test_the_raw_run_gets_no_gradients(passes: Passes, losses: LossConfig):
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


def test_a_run_without_saes_has_a_total(passes: Passes):
    without = Passes({LATER: passes.orig_acts[LATER]}, {LATER: passes.new_acts[LATER]})
    losses = LossConfig.model_validate(
        {"sparsity": {"coeff": 1.0}, "in_to_orig": {"hook_positions": LATER, "total_coeff": 2.0}}
    )
    total, values = total_loss(losses, without)
    assert floats(values) == {f"in_to_orig/{LATER}": 1.0}
    assert total.item() == 2.0


@pytest.mark.parametrize(
    ("fields", "needs_logits", "needs_spliced_pass", "raw", "spliced"),
    [
        ({"sparsity": {"coeff": 1}}, False, False, [], []),
        ({"out_to_in": {"coeff": 1}}, False, False, [], []),
        ({"out_to_orig": {"coeff": 1}}, False, True, [FIRST, SECOND], []),
        (
            {"in_to_orig": {"total_coeff": 1, "hook_positions": [SECOND, LATER]}},
            False,
            True,
            [SECOND, LATER],
            [LATER],
        ),
        ({"logits_kl": {"coeff": 1}}, True, True, [], []),
    ],
    ids=["sparsity", "out_to_in", "out_to_orig", "in_to_orig", "logits_kl"],
)
def test_each_term_says_what_it_needs(
    fields: dict[str, dict[str, object]],
    needs_logits: bool,
    needs_spliced_pass: bool,
    raw: list[str],
    spliced: list[str],
):
    ((_, term),) = LossConfig.model_validate(fields).terms().items()
    assert (term.needs_logits, term.needs_spliced_pass) == (needs_logits, needs_spliced_pass)
    assert term.raw_positions([FIRST, SECOND]) == raw
    assert term.spliced_positions([FIRST, SECOND]) == spliced


def test_the_loss_section_of_an_original_config_loads_and_survives_a_round_trip():
    fields = {
        "sparsity": {"p_norm": 1.0, "coeff": 3.0},
        "in_to_orig": {"hook_positions": [SECOND, LATER], "total_coeff": 2.5},
        "out_to_orig": None,
        "out_to_in": None,
        "logits_kl": {"coeff": 0.5},
    }
    losses = LossConfig.model_validate(fields)
    assert list(losses.terms()) == ["sparsity", "in_to_orig", "logits_kl"]
    assert LossConfig.model_validate(losses.model_dump(mode="json")) == losses


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no term, so there is nothing to train; set one of sparsity, in_to_orig"),
        ({"sparsity": None, "logits_kl": None}, "has no term"),
        ({"sparsity": {"coeff": 0}, "logits_kl": {"coeff": 0}}, "every coefficient is 0"),
        ({"sparsity": {"coeff": -1}}, "sparsity.coeff\n  .*greater than or equal to 0"),
        ({"sparsity": {"coeff": float("inf")}}, "sparsity.coeff\n  .*finite"),
        ({"sparsity": {"coeff": 1, "p_norm": 0}}, "sparsity.p_norm\n  .*greater than 0"),
        ({"sparsity": {}}, "sparsity.coeff\n  Field required"),
        ({"logit_kl": {"coeff": 1}}, "'logit_kl'; did you mean 'logits_kl'"),
        ({"in_to_orig": {"total_coeff": 1, "hook_positions": []}}, "names no hook point"),
        (
            {"in_to_orig": {"total_coeff": 1, "hook_positions": [SECOND, LATER, SECOND]}},
            rf"hook_positions\n.*'{SECOND}' is repeated; name it once",
        ),
    ],
)
def test_bad_loss_is_rejected(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        LossConfig.model_validate(fields)


def test_configs_load_without_torch():
    code = (
        "import sys, sparsify.losses.loss, sparsify.saes.config; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
