"""Laws of all kinds whose encoder and decoder are affine maps."""

import copy
from collections.abc import Callable

import pytest
import torch
from example_saes import KINDS
from torch import Tensor
from torch.nn import functional as F

from sparsify.kernels import sparse
from sparsify.saes.base import NewElements
from sparsify.saes.batch_topk import BatchTopKSAE
from sparsify.saes.build import build_sae
from sparsify.saes.config import KINDS as KIND_CONFIGS
from sparsify.saes.gated import GatedSAE
from sparsify.saes.jumprelu import JumpReLUSAE
from sparsify.saes.linear import Decoder, LinearSAE
from sparsify.saes.matryoshka import MatryoshkaSAE
from sparsify.saes.relu import ReLUSAE
from sparsify.saes.relu_tied_bias import ReLUTiedBiasSAE
from sparsify.saes.topk import TopKSAE
from sparsify.saes.transcoder import Transcoder
from sparsify.training.optimizers import build_adam
from sparsify.training.steps import GradientStepper

Build = Callable[[int, int], LinearSAE]


def with_skip(sae: LinearSAE) -> LinearSAE:
    sae.add_skip()
    return sae


# Of width and dictionary size; the transcoders write two dimensions more than they read.
SPARSE: dict[str, Build] = {
    "relu_tied_bias": ReLUTiedBiasSAE,
    "topk": lambda d_act, n_dict: TopKSAE(d_act, n_dict, k=3),
    "batch_topk": lambda d_act, n_dict: BatchTopKSAE(d_act, n_dict, k=3),
    "matryoshka": lambda d_act, n_dict: MatryoshkaSAE(d_act, n_dict, 3, [n_dict // 2]),
    "transcoder": lambda d_act, n_dict: Transcoder(d_act, n_dict, d_act + 2),
    "topk_skip": lambda d_act, n_dict: with_skip(Transcoder(d_act, n_dict, d_act + 2, 3)),
}
HELD: dict[str, Build] = {
    **SPARSE,
    "jumprelu": lambda d_act, n_dict: JumpReLUSAE(d_act, n_dict, 0.5, 0.1),
    "gated": GatedSAE,
}
ALL: dict[str, Build] = {**HELD, "relu": ReLUSAE}


@pytest.mark.parametrize("name", [n for n in HELD if n not in ("transcoder", "topk_skip")])
def test_the_encoder_starts_as_the_decoder_transposed(name: str):
    sae = HELD[name](4, 9)
    torch.testing.assert_close(sae.affine.weight, sae.dict_elements, rtol=0, atol=0)
    torch.testing.assert_close(sae.dict_elements.norm(dim=1), torch.ones(9))
    assert not sae.affine.bias.any()
    assert not sae.decoder.bias.any()


@pytest.mark.parametrize("is_sparse", [False, True])
def test_projection_matches_hand_computation(is_sparse: bool):
    # e = (0.6, 0.8), gradient (5, 0): e . gradient = 3, so (5, 0) - 3 e = (3.2, -2.4) remains.
    decoder = Decoder(d_out=2, n_dict=2)
    decoder.load_state_dict(
        {"weight": torch.tensor([[1.0, 0.6], [0.0, 0.8]]), "bias": torch.zeros(2)}
    )
    grad = torch.tensor([[0.0, 0.0], [5.0, 0.0]])
    decoder.elements.grad = grad.to_sparse(1) if is_sparse else grad
    decoder.project_gradient()
    assert decoder.elements.grad.is_sparse == is_sparse
    expected = torch.tensor([[0.0, 0.0], [3.2, -2.4]])
    torch.testing.assert_close(decoder.elements.grad.to_dense(), expected)


def test_elements_that_are_not_held_keep_gradient_and_norm():
    sae = ReLUSAE(4, 9)
    elements = sae.decoder.elements
    grad, before = torch.randn_like(elements), elements.detach().clone()
    elements.grad = grad.clone()
    sae.project_gradients()
    sae.restore_constraints()
    torch.testing.assert_close((elements.grad, elements.detach()), (grad, before), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "is_sparse"), [*((name, False) for name in HELD), *((name, True) for name in SPARSE)]
)
def test_in_training_gradients_are_orthogonal_to_elements_which_keep_unit_norm(
    name: str, is_sparse: bool, monkeypatch: pytest.MonkeyPatch
):
    sae = HELD[name](8, 256 if is_sparse else 16)
    if is_sparse:  # so few elements are active that gradients hold their rows alone
        monkeypatch.setattr(sparse, "MIN_DENSE_SIZE", 0)
        sae.row_sparse_grads = True
        with torch.no_grad():
            sae.affine.bias[8:] = -100.0
    elements = sae.decoder.elements
    before = elements.detach().clone()
    were_sparse: set[bool] = set()

    def look(_: Tensor) -> None:
        assert elements.grad is not None
        were_sparse.add(elements.grad.is_sparse)
        along = (elements.grad.to_dense() * elements).sum(dim=1)
        assert along.abs().max() < 1e-6

    optimizer = build_adam(sae.parameters(), lr=0.01)
    stepper = GradientStepper(
        sae.parameters(), [optimizer], [], constrained=[sae], before_step=look
    )
    for _ in range(50 if is_sparse else 100):
        output = sae(torch.randn(4, 8)).output
        stepper.backward((output - torch.randn_like(output)).square().mean())
    assert were_sparse == {is_sparse}
    assert (elements - before)[:8].norm(dim=1).min() > 0.05
    torch.testing.assert_close(elements.norm(dim=1), torch.ones(len(elements)), atol=1e-5, rtol=0)


def dense_formula(sae: LinearSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Code and output, with the gradients of plain tensor operations."""
    centre = 0.0 if isinstance(sae, Transcoder) else sae.decoder.bias
    pre_acts = F.linear(x - centre, sae.affine.weight, sae.affine.bias)
    if isinstance(sae, BatchTopKSAE):
        smallest = pre_acts.flatten().topk(sae.k * x.shape[:-1].numel()).values[-1]
        c = pre_acts.relu() * (pre_acts >= smallest)
    elif isinstance(sae, (TopKSAE, Transcoder)) and sae.k is not None:
        c = pre_acts.relu() * (pre_acts >= pre_acts.topk(sae.k).values[..., -1:])
    else:
        c = pre_acts.relu()
    output = F.linear(c, sae.decoder.elements.T, sae.decoder.bias)
    if isinstance(sae, Transcoder) and sae.skip is not None:
        output = output + F.linear(x, sae.skip.weight)
    return c, output


@pytest.mark.parametrize("row_sparse_grads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPARSE)
def test_active_entries_give_what_the_dense_formula_gives(
    name: str, dtype: torch.dtype, row_sparse_grads: bool
):
    sae = SPARSE[name](64, 1024).to(dtype)
    sae.row_sparse_grads = row_sparse_grads
    with torch.no_grad():
        sae.affine.weight.normal_(std=0.125)
        sae.affine.bias.uniform_(-2.0, -1.0)[200:] = -100.0
        sae.decoder.bias.normal_()
        if isinstance(sae, Transcoder) and sae.skip is not None:
            sae.skip.weight.normal_()
    x = torch.randn(8, 64, 64, dtype=dtype, requires_grad=True)
    expected = dense_formula(sae, x)
    assert sparse.find_active(expected[0], sae.d_act) is not None
    acts = sae(x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close((acts.c, acts.output), expected, atol=tolerance, rtol=tolerance)
    wanted = [x, *sae.parameters()]
    grads, expected_grads = (
        torch.autograd.grad(sum_of_squares(c + 1) + sum_of_squares(output - 1), wanted)
        for c, output in ((acts.c, acts.output), expected)
    )
    assert [grad.is_sparse for grad in grads].count(True) == 2 * row_sparse_grads
    dense_grads = tuple(grad.to_dense() for grad in grads)
    torch.testing.assert_close(dense_grads, expected_grads, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_same_gradients_from_active_entries_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    config = {"dict_size_to_input_ratio": 2.0, **KINDS[kind]}
    sae = build_sae(KIND_CONFIGS[kind].model_validate(config), 16)
    x = torch.randn(3, 5, 16, requires_grad=True)

    def gradients() -> list[Tensor]:
        acts = sae(x)
        loss = sum_of_squares(acts.c + 1) + sum_of_squares(acts.output - 1)
        wanted = [x, *sae.parameters()]
        return [grad.to_dense() for grad in torch.autograd.grad(loss, wanted)]

    dense = gradients()
    monkeypatch.setattr(sparse, "MIN_DENSE_SIZE", 0)
    monkeypatch.setattr(sparse, "MAX_ACTIVE_SHARE", 1.0)
    torch.testing.assert_close(gradients(), dense, atol=1e-5, rtol=1e-5)


def sum_of_squares(rows: Tensor) -> Tensor:
    """On average over tokens."""
    return rows.square().sum(dim=-1).mean()


def with_new_elements(name: str) -> tuple[LinearSAE, LinearSAE, Tensor, Tensor, Tensor]:
    """An SAE before and after elements 7 and 2 were reset; inputs, targets and mean input."""
    sae = ALL[name](4, 9)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    before = copy.deepcopy(sae)
    inputs, targets, mean = torch.randn(2, 4), torch.randn(2, sae.d_out), torch.randn(4)
    sae.reset_elements(NewElements(torch.tensor([7, 2]), inputs, targets, mean))
    return before, sae, inputs, targets, mean


@pytest.mark.parametrize("name", ALL)
def test_reset_elements_leave_the_others_as_they_are(name: str):
    before, sae, *_ = with_new_elements(name)
    of_elements = [parameter for parameter in sae.parameters() if len(parameter) == sae.n_dict]
    assert {id(p) for p in of_elements} == {id(p) for p in sae.element_parameters()}
    for old, new in zip(before.parameters(), sae.parameters(), strict=True):
        kept = [0, 1, 3, 4, 5, 6, 8] if len(old) == sae.n_dict else slice(None)
        assert torch.equal(old[kept], new[kept])


@pytest.mark.parametrize("name", ALL)
def test_reset_elements_read_their_input_and_write_their_target(name: str):
    before, sae, inputs, targets, mean = with_new_elements(name)
    is_centred = name not in ("relu", "transcoder", "topk_skip")
    direction = unit(inputs - (before.decoder.bias if is_centred else mean))
    length = 0.2 * before.affine.weight[[0, 1, 3, 4, 5, 6, 8]].norm(dim=1).mean()
    torch.testing.assert_close(sae.affine.weight[[7, 2]], length * direction)
    skip = getattr(before, "skip", None)
    left = targets - before.decoder.bias - (skip(inputs) if skip is not None else 0.0)
    torch.testing.assert_close(sae.dict_elements[[7, 2]], unit(left))
    if is_centred:
        assert sae.affine.bias[[7, 2]].tolist() == [0.0, 0.0]
    else:
        torch.testing.assert_close(sae.affine(mean)[[7, 2]], torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_all_elements_can_be_reset(name: str):
    sae, rows = ALL[name](4, 9), torch.randn(9, 4)
    sae.reset_elements(
        NewElements(torch.arange(9), rows, torch.randn(9, sae.d_out), torch.zeros(4))
    )
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)
