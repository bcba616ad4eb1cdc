import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.kernels.reference import dense_relu_sae
from sparsify.kernels.sparse import ActiveEntries, decode_active, find_active

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def sae_tensors(d_act: int, n_dict: int, bias: float, dtype: torch.dtype) -> list[nn.Parameter]:
    """Encoder weight and bias, elements, decoder bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(n_dict, d_act), (n_dict,), (n_dict, d_act), (d_act,)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    tensors[0] /= d_act**0.5
    tensors[1] = tensors[1] / 10 + bias
    return [nn.Parameter(tensor) for tensor in tensors]


def entries_of(c: Tensor) -> ActiveEntries:
    """All entries of a code, however many."""
    return ActiveEntries.at(c.flatten().nonzero().squeeze(1), c.shape[-1], c.numel())


def sparse_relu_sae(
    input: Tensor, *tensors: Tensor, row_sparse_grads: bool = False
) -> tuple[Tensor, Tensor]:
    c = F.relu(F.linear(input, *tensors[:2]))
    return decode_active(entries_of(c), c, input, *tensors, row_sparse_grads=row_sparse_grads)


def loss_of(c: Tensor, output: Tensor) -> Tensor:
    """A term of the code, inactive entries too, and one of the output."""
    return (c * torch.arange(c.numel()).view_as(c).cos()).mean() + output.square().mean()


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]):
    tolerance = TOLERANCE[expected[0].dtype]
    actual = tuple(tensor.to_dense() for tensor in actual)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# Biases with which no entry of the code is active, few, half, all.
@pytest.mark.parametrize("bias", [-9.0, -1.5, 0.0, 5.0])
@pytest.mark.parametrize("shape", [(3, 7), (), (1,), (1, 1), (2, 3, 1), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_active_entries_give_what_the_dense_formula_gives(
    dtype: torch.dtype, shape: tuple[int, ...], bias: float
):
    tensors = sae_tensors(5, 11, bias, dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, 5, generator=generator, dtype=dtype).requires_grad_()
    expected = dense_relu_sae(x, *tensors)
    expected_grads = torch.autograd.grad(loss_of(*expected), (x, *tensors))
    for row_sparse_grads in (False, True):
        actual = sparse_relu_sae(x, *tensors, row_sparse_grads=row_sparse_grads)
        assert_same(actual, expected)
        assert_same(torch.autograd.grad(loss_of(*actual), (x, *tensors)), expected_grads)


@pytest.mark.parametrize("wanted", [[0], [1, 2], [3], [4], [0, 3]])
def test_frozen_tensors_get_no_gradient(wanted: list[int]):
    tensors = [torch.randn(4, 5, dtype=torch.float64), *sae_tensors(5, 11, -1.0, torch.float64)]
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index in wanted)
    loss_of(*sparse_relu_sae(*tensors)).backward()
    trained = [tensors[index] for index in wanted]
    expected = torch.autograd.grad(loss_of(*dense_relu_sae(*tensors)), trained)
    assert [index for index, tensor in enumerate(tensors) if tensor.grad is not None] == wanted
    assert_same(tuple(t.grad for t in trained if t.grad is not None), expected)


@pytest.mark.parametrize("used", ["c", "output"])
def test_a_loss_of_one_result_alone_has_its_gradient(used: str):
    tensors = sae_tensors(5, 11, -1.0, torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    index = ("c", "output").index(used)
    # All but the decoder's bias, on which the code does not depend.
    expected, actual = (
        torch.autograd.grad(sae(x, *tensors)[index].square().sum(), tensors, materialize_grads=True)
        for sae in (dense_relu_sae, sparse_relu_sae)
    )
    assert_same(actual, expected)


def test_elements_without_a_norm_are_treated_as_in_the_dense_formula():
    tensors = sae_tensors(5, 11, 0.0, torch.float64)
    with torch.no_grad():
        tensors[2][3] = 0.0
        tensors[2][4] *= 1e-14
    x = torch.randn(6, 5, dtype=torch.float64)
    expected, actual = dense_relu_sae(x, *tensors), sparse_relu_sae(x, *tensors)
    assert_same(actual, expected)
    assert_same(
        torch.autograd.grad(loss_of(*actual), tensors),
        torch.autograd.grad(loss_of(*expected), tensors),
    )


def test_gradients_of_elements_match_hand_computation():
    # One token (1, 0), c = (2, 0), e = (3, 4): output 2 (3/5, 4/5), and dL/doutput = (1, 0).
    # dL/de = 2/5 (1, 0) - (3, 4) / 25 * 2/5 * 3 = (0.256, -0.192), orthogonal to e.
    # dL/dc = (1, 0) . (3, 4) / 5 = 0.6, dL/dW = 0.6 (1, 0), dL/db = 0.6.
    tensors = [[[2.0, 0.0], [-1.0, 0.0]], [0.0, 0.0], [[3.0, 4.0], [1.0, 0.0]], [0.0, 0.0]]
    tensors = [nn.Parameter(torch.tensor(tensor)) for tensor in tensors]
    _, output = sparse_relu_sae(torch.tensor([[1.0, 0.0]]), *tensors)
    torch.testing.assert_close(output, torch.tensor([[1.2, 1.6]]))
    grads = torch.autograd.grad(output[0, 0], tensors)
    torch.testing.assert_close(grads[0], torch.tensor([[0.6, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(grads[1], torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(grads[2], torch.tensor([[0.256, -0.192], [0.0, 0.0]]))


def test_row_sparse_gradients_hold_the_active_elements_alone():
    tensors = sae_tensors(5, 40, -2.0, torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    c, output = sparse_relu_sae(x, *tensors, row_sparse_grads=True)
    grads = torch.autograd.grad(loss_of(c, output), tensors)
    active = c.any(dim=0).nonzero().squeeze(1)
    assert 0 < len(active) <= 20
    assert [grad.is_sparse for grad in grads] == [True, False, True, False]
    for grad in (grads[0], grads[2]):
        assert torch.equal(grad.coalesce().indices()[0], active)


def test_gradients_of_two_batches_add_up():
    tensors = sae_tensors(5, 40, -2.0, torch.float64)
    dense = copy.deepcopy(tensors)
    for x in torch.randn(2, 4, 5, dtype=torch.float64):
        loss_of(*sparse_relu_sae(x, *tensors, row_sparse_grads=True)).backward()
        loss_of(*dense_relu_sae(x, *dense)).backward()
    for ours, theirs in zip(tensors, dense, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_same((ours.grad,), (theirs.grad,))


def test_entries_are_found_where_a_code_is_sparse_and_large():
    c = torch.zeros(64, 1024)
    c[3, 5] = 1.0
    c[30, 7] = float("nan")
    entries = find_active(c, d_act=512)  # 2^25
    assert entries is not None
    assert (entries.token.tolist(), entries.element.tolist()) == ([3, 30], [5, 7])
    assert find_active(c, d_act=511) is None
    assert find_active(c.bfloat16(), d_act=512) is None
    assert find_active(c.to("meta"), d_act=512) is None
    c[:, :42] = 1.0  # 42 of 1024 are more than 0.04
    assert find_active(c, d_act=512) is None
