from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

from sparsify.losses.total import MeanLoss
from sparsify.runs.weight_files import load_state, save_state, state_path
from sparsify.training.accumulation import merge_rows
from sparsify.training.optimizers import build_adam
from sparsify.training.steps import GradientStepper


def _stepper(
    parameter: nn.Parameter, n_accumulation_steps: int = 1, max_grad_norm: float | None = None
) -> GradientStepper:
    optimizer = SGD([parameter], lr=1.0)
    return GradientStepper(
        [parameter],
        [optimizer],
        [LambdaLR(optimizer, lambda step: 0.5**step)],
        n_accumulation_steps=n_accumulation_steps,
        max_grad_norm=max_grad_norm,
    )


def test_clipped_step_matches_hand_computation():
    parameter = nn.Parameter(torch.zeros(2))
    stepper = _stepper(parameter, max_grad_norm=1.0)
    norm = stepper.backward(parameter @ torch.tensor([3.0, 4.0]))  # gradient (3, 4), norm 5
    assert norm is not None
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.6, -0.8]))
    assert (stepper.n_steps, stepper.lr) == (1, 0.5)


def test_small_gradient_is_not_clipped():
    parameter = nn.Parameter(torch.zeros(2))
    stepper = _stepper(parameter, max_grad_norm=10.0)
    stepper.backward(parameter @ torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(parameter.detach(), torch.tensor([-3.0, -4.0]))


def test_accumulated_batches_equal_one_large_batch():
    inputs = torch.randn(8, 3)
    whole, parts = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    norm = _stepper(whole, max_grad_norm=0.5).backward((inputs @ whole).square().mean())
    stepper = _stepper(parts, n_accumulation_steps=4, max_grad_norm=0.5)
    norms = [stepper.backward((batch @ parts).square().mean()) for batch in inputs.split(2)]
    assert norms[:3] == [None] * 3
    torch.testing.assert_close(norms[3], norm)
    torch.testing.assert_close(parts, whole)
    assert stepper.n_steps == 1


def test_run_resumed_in_the_middle_of_a_step_goes_on_alike(tmp_path: Path):
    def start() -> tuple[nn.Parameter, GradientStepper]:
        parameter = nn.Parameter(torch.ones(3))
        optimizer = Adam([parameter], lr=0.1)
        scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
        return parameter, GradientStepper(
            [parameter], [optimizer], [scheduler], n_accumulation_steps=2
        )

    def run(parameter: nn.Parameter, stepper: GradientStepper, inputs: Tensor) -> None:
        for row in inputs:
            stepper.backward((row @ parameter).square())

    inputs = torch.randn(10, 3)
    whole, stepper = start()
    run(whole, stepper, inputs[:5])
    save_state(tmp_path, 5, {"stepper": stepper.state_dict(), "weights": whole.detach()})
    run(whole, stepper, inputs[5:])

    resumed, stepper = start()
    state = load_state(state_path(tmp_path, 5))
    resumed.data.copy_(state["weights"])
    stepper.load_state_dict(state["stepper"])
    run(resumed, stepper, inputs[5:])
    assert torch.equal(resumed, whole)
    assert stepper.n_steps == 5


@pytest.mark.parametrize("n_accumulation_steps", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_row_sparse_gradients_give_the_steps_of_dense_ones(
    tmp_path: Path, max_grad_norm: float | None, n_accumulation_steps: int
):
    def start(weights: Tensor) -> tuple[nn.Parameter, GradientStepper]:
        parameter, bias = nn.Parameter(weights.clone()), nn.Parameter(torch.zeros(3))
        return parameter, GradientStepper(
            [parameter, bias],
            [build_adam([parameter, bias], lr=0.1)],
            [],
            n_accumulation_steps=n_accumulation_steps,
            max_grad_norm=max_grad_norm,
        )

    def backward(stepper: GradientStepper, tokens: Tensor, is_sparse: bool) -> Tensor | None:
        parameter, bias = stepper.parameters
        return stepper.backward((F.embedding(tokens, parameter, sparse=is_sparse) + bias).norm())

    weights = torch.randn(20, 3)
    ours, ours_stepper = start(weights)
    theirs, theirs_stepper = start(weights)
    for index, tokens in enumerate(torch.randint(20, (5 * n_accumulation_steps, 4))):
        norms = backward(ours_stepper, tokens, True), backward(theirs_stepper, tokens, False)
        torch.testing.assert_close(*norms)
        if index == 4:  # with accumulation, in the middle of a step
            save_state(tmp_path, 5, {"stepper": ours_stepper.state_dict()})
            bias = ours_stepper.parameters[1].detach()
            ours, ours_stepper = start(ours.detach())
            ours_stepper.parameters[1].data.copy_(bias)
            ours_stepper.load_state_dict(load_state(state_path(tmp_path, 5))["stepper"])
    assert ours_stepper.n_steps == 5
    torch.testing.assert_close(ours, theirs)


def test_rows_of_several_batches_are_added():
    rows = torch.tensor([[1.0], [2.0], [4.0]])
    summed = torch.sparse_coo_tensor(torch.tensor([[5, 0, 5]]), rows, (6, 1), check_invariants=True)
    merged = merge_rows(summed)
    assert merged.indices().tolist() == [[0, 5]]
    assert merged.values().tolist() == [[2.0], [5.0]]


def test_a_gradient_with_most_rows_becomes_dense():
    index = torch.tensor([[2, 0, 2]])
    summed = torch.sparse_coo_tensor(index, torch.ones(3, 1), (3, 1), check_invariants=True)
    torch.testing.assert_close(merge_rows(summed), torch.tensor([[1.0], [0.0], [2.0]]))


def test_batches_of_as_many_items_give_the_bits_of_a_mean_over_batches():
    inputs = torch.randn(3, 5, 7)
    parameter = nn.Parameter(torch.randn(7))
    for batch in inputs:
        ((batch @ parameter).square().mean() / 3).backward()
    stepper = _stepper(moved := nn.Parameter(parameter.detach().clone()), n_accumulation_steps=3)
    for batch in inputs:
        stepper.backward([MeanLoss((batch @ moved).square().mean(), 5)])
    assert parameter.grad is not None
    assert torch.equal(moved, parameter - parameter.grad)


def test_parts_of_a_loss_are_each_averaged_over_their_items():
    # Gradients 1 and 5 over 3 and 1 items of the first part, 10 over 2 of the second; the others
    # hold none: (3 * 1 + 1 * 5) / 4 + 10 = 12.
    parameter = nn.Parameter(torch.tensor(0.0))
    stepper = _stepper(parameter, n_accumulation_steps=3)
    none = MeanLoss(torch.zeros(()), 0)
    stepper.backward([MeanLoss(1 * parameter, 3), none])
    stepper.backward([])
    stepper.backward([MeanLoss(5 * parameter, 1), MeanLoss(10 * parameter, 2)])
    assert parameter.item() == pytest.approx(-12.0)


def stepper_gradients(stepper: GradientStepper) -> list[Tensor]:
    return [p.grad for p in stepper.parameters if p.grad is not None]


def test_row_sparse_gradients_of_different_counts_are_averaged():
    table = nn.Parameter(torch.zeros(9, 2))
    stepper = GradientStepper([table], [build_adam([table], lr=0.1)], [], n_accumulation_steps=2)
    seen: list[Tensor] = []
    stepper.before_step = lambda norm: seen.extend(stepper_gradients(stepper))
    for rows, n in ((torch.tensor([1, 3]), 1), (torch.tensor([3, 4]), 3)):
        entries = F.embedding(rows, table, sparse=True)
        stepper.backward([MeanLoss(entries.sum(), n), MeanLoss(2 * entries[1].sum(), 1)])
    # By the first part 1/4 of row 1, 3/4 of row 4, and all of row 3; by the second half of twice
    # rows 3 and 4.
    expected = torch.zeros(9, 2)
    expected[1], expected[3], expected[4] = 0.25, 1.0 + 1.0, 0.75 + 1.0
    assert seen[0].is_sparse
    torch.testing.assert_close(seen[0].to_dense(), expected)
