import pytest
import torch
from torch import Tensor

from sparsify.saes.relu import ReLUSAE
from sparsify.saes.transcoder import Transcoder
from sparsify.training.decoder_bias import geometric_median, set_decoder_bias


@pytest.mark.parametrize(
    ("rows", "median"),
    [
        # Of three points on a line it is the middle one, wherever that lies.
        ([[0, 0], [3, 4], [30, 40]], [3, 4]),
        # Of a triangle with an angle of 120 degrees or more it is that corner.
        ([[-5, 0], [5, 0], [0, 1]], [0, 1]),
        # Of a convex quadrilateral it is where the diagonals cross.
        ([[0, 0], [4, 0], [4, 4], [-1, 5]], [2, 2]),
        ([[2, 3]], [2, 3]),
        ([[2, 3], [2, 3]], [2, 3]),
    ],
)
def test_geometric_median_by_hand(rows: list[list[float]], median: list[float]):
    actual = geometric_median(torch.tensor(rows, dtype=torch.float32))
    torch.testing.assert_close(actual, torch.tensor(median, dtype=torch.float32), rtol=0, atol=1e-3)


def test_no_point_near_the_geometric_median_has_a_smaller_sum_of_distances():
    rows = torch.randn(50, 3, dtype=torch.float64).exp()

    def sum_of_distances(point: Tensor) -> Tensor:
        return (rows - point).norm(dim=1).sum()

    median = geometric_median(rows)
    least = sum_of_distances(median)
    for direction in torch.randn(20, 3, dtype=torch.float64):
        assert sum_of_distances(median + 0.01 * direction) > least


def test_the_geometric_median_is_hardly_moved_by_an_outlier():
    rows = torch.randn(200, 4)
    without = geometric_median(rows)
    rows[0] = 3000.0
    assert (geometric_median(rows) - without).norm() < 0.05
    assert rows.mean(dim=0).norm() > 20


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
def test_the_bias_is_set_to_the_middle_of_all_tokens(shape: tuple[int, ...]):
    # The mean is (6, 0); on a line the median is any between the third and the fourth.
    values = torch.tensor([1.0, 2.0, 3.0, 3.0, 3.0, 24.0])
    targets = torch.stack([values, torch.zeros(6)], dim=1).reshape(*shape, 2)
    sae = ReLUSAE(2, 3)
    others = {name: value.clone() for name, value in sae.state_dict().items()}
    set_decoder_bias(sae, targets, "mean")
    torch.testing.assert_close(sae.decoder.bias.detach(), torch.tensor([6.0, 0.0]))
    set_decoder_bias(sae, targets, "geometric_median")
    torch.testing.assert_close(
        sae.decoder.bias.detach(), torch.tensor([3.0, 0.0]), rtol=0, atol=1e-3
    )
    assert sae.decoder.bias.requires_grad
    after = sae.state_dict()
    assert all(after[name].equal(value) for name, value in others.items() if name != "decoder.bias")


def test_the_bias_of_a_transcoder_has_the_width_of_what_it_writes():
    sae = Transcoder(5, 7, 2)
    set_decoder_bias(sae, torch.tensor([[1.0, 3.0], [3.0, 5.0]]).bfloat16(), "mean")
    assert sae.decoder.bias.tolist() == [2.0, 4.0]
