import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam, Muon

from sparsify.training import optimizers
from sparsify.training.optimizers import Float32Muon, build_adam, build_muon, orthogonalize


def _matrices(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def test_float32_muon_takes_the_steps_of_torch():
    ours, theirs = _matrices((8, 8), (8, 16), (16, 8)), _matrices((8, 8), (8, 16), (16, 8))
    start = [parameter.detach().clone() for parameter in ours]
    optimizers = [Float32Muon(ours, lr=0.1), Muon(theirs, lr=0.1)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        # Torch rounds to the 8 bits of bfloat16.
        assert (a - b).norm() < 0.02 * (a - before).norm()


def test_orthogonalized_singular_values_are_near_one():
    for matrix in _matrices((12, 12), (12, 30), (30, 12)):
        values = torch.linalg.svdvals(orthogonalize(matrix.detach(), (3.4445, -4.775, 2.0315), 5))
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_muon_gets_the_matrices_of_the_blocks_and_adam_the_rest():
    block = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "blocks": nn.ModuleList([block]), "norm": nn.LayerNorm(4)}
    )
    muon, adam = build_muon(model.named_parameters(), lr=0.02, adam_lr=1e-3)
    in_muon, in_adam = ({id(p) for p in o.param_groups[0]["params"]} for o in (muon, adam))
    assert in_muon == {id(block.weight)}
    assert in_adam == {id(p) for p in model.parameters()} - in_muon
    assert (muon.param_groups[0]["lr"], adam.param_groups[0]["lr"]) == (0.02, 1e-3)


def test_muon_without_a_matrix_is_an_error():
    with pytest.raises(ValueError, match="no matrix is in a part named blocks or layers"):
        build_muon(nn.Linear(3, 3).named_parameters(), lr=0.1, adam_lr=0.1)


def test_first_adam_step_is_the_learning_rate():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, -2.0, 4.0])  # Adam's first step is lr times the sign.
    build_adam([parameter], lr=0.5).step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.5, 0.5, -0.5]))


def test_rows_without_gradient_go_on_moving():
    parameter = nn.Parameter(torch.zeros(2, 1))
    adam = build_adam([parameter], lr=0.5)
    for row in (0, 1):
        adam.zero_grad()
        F.embedding(torch.tensor([row]), parameter, sparse=True).sum().backward()
        adam.step()
    # Row 0 has gradients 1 and 0: after lr by sign, m = 0.9 * 0.1 over 1 - 0.9^2 is 0.473684 and
    # v = 0.999 * 0.001 over 1 - 0.999^2 is 0.499750, so 0.5 * 0.473684 / 0.706930 = 0.335029 more.
    # Row 1 has gradients 0 and 1: m = 0.1 over 0.19, v = 0.001 over 0.001999, so 0.5 * 0.744138.
    torch.testing.assert_close(parameter.detach(), torch.tensor([[-0.835029], [-0.372069]]))


def test_adam_takes_row_sparse_gradients_as_it_takes_dense_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optimizers, "BLOCK_NUMEL", 12)  # 3 rows
    (ours,), (theirs,) = _matrices((10, 4)), _matrices((10, 4))
    ours_adam, theirs_adam = build_adam([ours], lr=0.1), Adam([theirs], lr=0.1)
    for step in range(5):
        rows, weights = torch.randint(10, (4,)), torch.randn(4, 4)
        for parameter, adam in ((ours, ours_adam), (theirs, theirs_adam)):
            adam.zero_grad()
            # Dense in one step of the five.
            taken = F.embedding(rows, parameter, sparse=parameter is ours and step != 3)
            (taken * weights).sum().backward()
            adam.step()
        if step == 2:  # Each goes on from the state of the other.
            states = ours_adam.state_dict(), theirs_adam.state_dict()
            ours_adam, theirs_adam = build_adam([ours], lr=0.1), Adam([theirs], lr=0.1)
            theirs_adam.load_state_dict(states[0])
            ours_adam.load_state_dict(states[1])
    torch.testing.assert_close(ours, theirs)
    ours_state, theirs_state = ours_adam.state[ours], theirs_adam.state[theirs]
    torch.testing.assert_close(ours_state["exp_avg_sq"], theirs_state["exp_avg_sq"])
    assert ours_state["step"] == theirs_state["step"] == 5
