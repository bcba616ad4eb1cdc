import pytest
import torch
from torch import Tensor

from sparsify.losses.dead import aux_k, pre_act
from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.losses.total import total_loss
from sparsify.saes.acts import SAEActs
from sparsify.saes.jumprelu import JumpReLUSAE
from sparsify.saes.linear import LinearSAE
from sparsify.saes.topk import TopKSAE
from sparsify.saes.transcoder import Transcoder

NONE = torch.tensor([False] * 4)
DEAD = torch.tensor([False, False, True, True])
POSITION = "blocks.0.hook_resid_pre"


def set_weights(sae: LinearSAE, encoder: list[list[float]], elements: list[list[float]]) -> None:
    with torch.no_grad():
        sae.affine.weight.copy_(torch.tensor(encoder))
        sae.affine.bias.zero_()
        sae.decoder.elements.copy_(torch.tensor(elements))
        sae.decoder.bias.zero_()


@pytest.fixture
def topk() -> TopKSAE:
    """Its last two elements are dead."""
    sae = TopKSAE(2, 4, k=1)
    set_weights(sae, [[1, 0], [0, 1], [0.5, 0], [0, -2]], [[1, 0], [0, 1], [1, 0], [0, -1]])
    return sae


def acts_of(output: Tensor, replaced: Tensor | None = None) -> SAEActs:
    input = torch.tensor([[2.0, 1.0], [1.0, -3.0]])
    return SAEActs(input, torch.zeros(2, 4), output, replaced=replaced)


# What is left out is (1, 1) and (-1, -1), of mean 0 and variance 4.
OUTPUT = torch.tensor([[1.0, 0.0], [2.0, -2.0]])


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        # The dead pre-activations are (1, -2) and (0.5, 6). Half the width is one element: (1, 0)
        # leaves (0, 1), and 6 * (0, -1) leaves (-1, 5).
        (None, (1 + 26) / 4),
        # A negative one writes nothing; (0.5, -6) leaves (-1.5, 5).
        (2, (1 + 27.25) / 4),
        # There are no more.
        (9, (1 + 27.25) / 4),
    ],
)
def test_aux_k_by_hand(topk: TopKSAE, k: int | None, expected: float):
    assert aux_k(topk, acts_of(OUTPUT), DEAD, k).item() == pytest.approx(expected)


def test_aux_k_of_elements_that_write_what_is_left_out_is_zero(topk: TopKSAE):
    output = torch.tensor(
        [[1.0, 1.0], [1.0, 3.0]]
    )  # 1 * e_2 = (1, 0) and 6 * e_3 = (0, -6) left out
    assert aux_k(topk, acts_of(output), DEAD).item() == pytest.approx(0)


def test_aux_k_leaves_an_element_out_where_it_fires(topk: TopKSAE):
    acts = acts_of(OUTPUT)
    acts.c[0, 2] = 1.0
    # As above, but nothing is written where (1, 1) is left out.
    assert aux_k(topk, acts, DEAD).item() == pytest.approx((2 + 26) / 4)


def test_aux_k_trains_dead_elements_and_not_the_error(topk: TopKSAE):
    output, target = OUTPUT.clone().requires_grad_(), torch.tensor([[3.0, 1.0], [1.0, -3.0]])
    target.requires_grad_()
    aux_k(topk, acts_of(output, target), DEAD).backward()
    assert output.grad is None
    assert target.grad is None
    for parameter in (topk.affine.weight, topk.affine.bias, topk.decoder.elements):
        assert parameter.grad is not None
        rows = parameter.grad.reshape(4, -1).any(dim=1)
        assert rows.tolist() == [False, False, True, True]
    assert topk.decoder.bias.grad is None


def test_aux_k_of_a_transcoder_is_about_what_it_writes():
    sae = Transcoder(2, 4, 3)
    elements = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    set_weights(sae, [[1, 0], [0, 1], [1, 0], [0, -1]], elements)
    target = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    # Dead pre-activations are (2, -1) and (1, 3), and one is used: 2 * e_2 leaves (0, 0, 1),
    # 3 * e_3 leaves (0, 0, -2). The target's mean is (1, 0, 1), its variance 1 + 1.
    value = aux_k(sae, acts_of(torch.zeros(2, 3), target), DEAD)
    assert value.item() == pytest.approx((1 + 4) / 2)


def test_aux_k_of_a_single_token_has_no_gradient(topk: TopKSAE):
    acts = acts_of(OUTPUT)
    one = SAEActs(acts.input[:1], acts.c[:1], acts.output[:1])  # nothing varies
    value = aux_k(topk, one, DEAD)
    value.backward()
    assert value == 0
    assert topk.affine.weight.grad is not None
    assert not topk.affine.weight.grad.any()


@pytest.fixture
def jumprelu() -> JumpReLUSAE:
    """Its last two elements are dead."""
    sae = JumpReLUSAE(2, 4, bandwidth=0.5, initial_threshold=1.0)
    set_weights(sae, [[1, 0], [0, 1], [1, 0], [0, 1]], [[1, 0]] * 4)
    with torch.no_grad():
        sae.log_threshold.copy_(torch.tensor([5.0, 5.0, 3.0, 2.0]).log())
    return sae


def test_pre_act_and_its_gradients_by_hand(jumprelu: JumpReLUSAE):
    value = pre_act(jumprelu, acts_of(OUTPUT), DEAD)
    value.backward()
    # Pre-activations (2, 1) and (1, -3) are below thresholds (3, 2) by (1, 1) and (2, 5); the mean
    # of two tokens over d_act = 2.
    assert value.item() == pytest.approx((1 + 1 + 2 + 5) / 2 / 2)
    # Each of the two tokens pulls with 1/4; on the logarithm of a threshold, threshold times that.
    torch.testing.assert_close(jumprelu.affine.bias.grad, torch.tensor([0, 0, -0.5, -0.5]))
    torch.testing.assert_close(jumprelu.log_threshold.grad, torch.tensor([0, 0, 1.5, 1.0]))
    assert jumprelu.decoder.bias.grad is None


def test_pre_act_leaves_an_element_that_fires_alone(jumprelu: JumpReLUSAE):
    with torch.no_grad():
        jumprelu.log_threshold.fill_(-9.0)
        jumprelu.affine.bias.fill_(4.0)
    value = pre_act(jumprelu, acts_of(OUTPUT), DEAD)
    value.backward()
    assert value == 0
    assert jumprelu.affine.bias.grad is not None
    assert not jumprelu.affine.bias.grad.any()


def test_without_dead_elements_both_are_zero(topk: TopKSAE, jumprelu: JumpReLUSAE):
    assert aux_k(topk, acts_of(OUTPUT), NONE) == 0
    assert pre_act(jumprelu, acts_of(OUTPUT), NONE) == 0


def test_terms_take_the_dead_elements_of_the_passes(topk: TopKSAE, jumprelu: JumpReLUSAE):
    later = "blocks.1.hook_resid_pre"
    acts = {POSITION: acts_of(OUTPUT), later: acts_of(torch.zeros(2, 2))}
    for sae, fields, plain in (
        (topk, {"aux_k": {"coeff": 0.5, "k": 2}}, lambda *args: aux_k(*args, k=2)),
        (jumprelu, {"pre_act": {"coeff": 0.5}}, pre_act),
    ):
        dead = {POSITION: DEAD, later: NONE}
        passes = Passes({}, dict(acts), saes=dict.fromkeys(acts, sae), dead=dead)
        total, values = total_loss(LossConfig.model_validate(fields), passes)
        (name,) = fields
        expected = plain(sae, acts[POSITION], DEAD).item()
        assert values[f"{name}/{POSITION}"].item() == pytest.approx(expected)
        assert values[f"{name}/{later}"] == 0
        assert total.item() == pytest.approx(0.5 * expected)
