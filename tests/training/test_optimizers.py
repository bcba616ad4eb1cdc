import pytest
import torch
from torch import nn
from torch.optim import Muon

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
