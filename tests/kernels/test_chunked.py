import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.evaluation.metrics import kl_divergence
from sparsify.kernels.chunked import chunked_cross_entropy, chunked_kl, tile_size
from sparsify.kernels.compiled import why_not_compiled
from sparsify.kernels.reference import full_cross_entropy, full_kl
from sparsify.kernels.unembedding import Unembedding

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


IDENTITY = Unembedding(torch.eye(2))


def soft_capped(d_model: int, d_vocab: int, dtype: torch.dtype) -> Unembedding:
    """A final norm, an unembedding with bias, and a soft cap, all with parameters to learn."""
    linear = nn.Linear(d_model, d_vocab, dtype=dtype)
    norm = nn.LayerNorm(d_model, dtype=dtype)
    return Unembedding(linear.weight.T, linear.bias, norm, lambda x: 5 * torch.tanh(x / 5))


def frozen(unembed: Unembedding) -> Unembedding:
    """The same with weights that do not learn."""
    weight, bias = unembed.weight.detach(), unembed.bias
    assert isinstance(unembed.norm, nn.Module)
    return replace(
        unembed,
        weight=weight,
        bias=None if bias is None else bias.detach(),
        norm=unembed.norm.requires_grad_(False),
    )


def learned(unembed: Unembedding) -> tuple[Tensor, ...]:
    """Tensors that get gradients in addition to a residual stream."""
    assert isinstance(unembed.norm, nn.Module)
    assert unembed.bias is not None
    return unembed.weight, unembed.bias, *unembed.norm.parameters()


class CountRows(Unembedding):
    """Records the number of rows that have logits at a time."""

    n_rows: ClassVar[list[int]] = []

    def products(self, normed: Tensor, buffer: Tensor) -> Tensor:
        self.n_rows.append(len(normed))
        return super().products(normed, buffer)


@pytest.fixture
def counting() -> CountRows:
    CountRows.n_rows.clear()
    return CountRows(torch.randn(4, 6), torch.randn(6))


def assert_close(actual: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]):
    """Assert that `actual` is within the tolerance of its precision."""
    first = actual if isinstance(actual, Tensor) else actual[0]
    tolerance = TOLERANCE[first.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def grads_of(loss: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    # A weight other than 1, which the backward pass has to respect.
    return torch.autograd.grad(3 * loss, wanted)


def as_resid(logits: list[list[float]], requires_grad: bool = False) -> Tensor:
    return torch.tensor(logits, requires_grad=requires_grad)


def test_kl_is_from_orig_to_new_by_hand():
    # p_orig = (1/2, 1/2), p_new = (1/4, 3/4):
    # KL(orig || new) = 1/2 log((1/2) / (1/4)) + 1/2 log((1/2) / (3/4)) = 0.143841,
    # while KL(new || orig) = 1/4 log(1/2) + 3/4 log(3/2) = 0.130812.
    orig, new = as_resid([[0.0, 0.0]]), as_resid([[0.0, math.log(3)]], requires_grad=True)
    kl = chunked_kl(orig, new, IDENTITY)
    assert kl.item() == pytest.approx(0.143841, abs=1e-6)
    kl.backward()
    # p_new - p_orig
    torch.testing.assert_close(new.grad, torch.tensor([[-0.25, 0.25]]))


def test_kl_is_averaged_over_tokens():
    # One token of 0.143841 nats as above and one of 0.
    orig = as_resid([[0.0, 0.0], [1.0, 2.0]])
    new = as_resid([[0.0, math.log(3)], [1.0, 2.0]])
    assert chunked_kl(orig, new, IDENTITY).item() == pytest.approx(0.143841 / 2, abs=1e-6)


def test_cross_entropy_by_hand():
    # p = (1/4, 3/4) at both tokens; targets 0 and 1: -(log 1/4 + log 3/4) / 2 = 0.836988
    resid = as_resid([[0.0, math.log(3)], [0.0, math.log(3)]], requires_grad=True)
    loss = chunked_cross_entropy(resid, torch.tensor([0, 1]), IDENTITY)
    assert loss.item() == pytest.approx(0.836988, abs=1e-6)
    loss.backward()
    # (p - one_hot(target)) / 2
    torch.testing.assert_close(resid.grad, torch.tensor([[-0.375, 0.375], [0.125, -0.125]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_size", [1, 4, 21, 1000, None])
@pytest.mark.parametrize("shape", [(3, 7), (1,), (1, 1), (2, 3, 1)])
def test_kl_equals_full_logits(dtype: torch.dtype, chunk_size: int | None, shape: tuple[int, ...]):
    unembed = soft_capped(5, 11, dtype)
    orig = torch.randn(*shape, 5, dtype=dtype, requires_grad=True)
    new = torch.randn(*shape, 5, dtype=dtype, requires_grad=True)
    kl, expected = chunked_kl(orig, new, unembed, chunk_size), full_kl(orig, new, unembed)
    assert_close(kl, expected)
    assert_close(grads_of(kl, new), grads_of(expected, new))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_size", [1, 4, 21, 1000, None])
@pytest.mark.parametrize("shape", [(3, 7), (1,)])
def test_cross_entropy_equals_full_logits(
    dtype: torch.dtype, chunk_size: int | None, shape: tuple[int, ...]
):
    unembed = soft_capped(5, 11, dtype)
    resid = torch.randn(*shape, 5, dtype=dtype, requires_grad=True)
    targets = torch.randint(11, shape)
    loss = chunked_cross_entropy(resid, targets, unembed, chunk_size)
    expected = full_cross_entropy(resid, targets, unembed)
    assert_close(loss, expected)
    wanted = (resid, *learned(unembed))
    assert_close(grads_of(loss, *wanted), grads_of(expected, *wanted))


def test_kl_gives_gradients_to_the_new_residual_stream_only():
    unembed = frozen(soft_capped(4, 6, torch.float32))
    orig, new = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    chunked_kl(orig, new, unembed).backward()
    assert new.grad is not None
    assert orig.grad is None


def test_kl_gives_gradients_to_what_learns_in_the_unembedding():
    unembed = soft_capped(4, 6, torch.float64)
    orig, new = (torch.randn(5, 4, dtype=torch.float64) for _ in range(2))
    constant = frozen(soft_capped(4, 6, torch.float64))
    log_orig = F.log_softmax(unembed(orig).detach(), dim=-1)
    expected = F.kl_div(
        F.log_softmax(unembed(new), dim=-1), log_orig, log_target=True, reduction="batchmean"
    )
    kl = chunked_kl(orig, new, unembed, 2)
    assert_close(grads_of(kl, *learned(unembed)), grads_of(expected, *learned(unembed)))
    assert not chunked_kl(orig, new, constant).requires_grad


@pytest.mark.parametrize("n_tokens", [1, 5, 8])
def test_kl_of_equal_runs_is_zero_with_zero_gradient(n_tokens: int):
    unembed = soft_capped(4, 6, torch.float64)
    resid = torch.randn(n_tokens, 4, dtype=torch.float64, requires_grad=True)
    kl = chunked_kl(resid, resid, unembed)
    # A product rounds a row of logits by where it stands.
    assert_close(kl, torch.zeros_like(kl))
    assert_close(grads_of(kl, resid)[0], torch.zeros_like(resid))


def test_frozen_parameters_get_no_gradient():
    unembed = frozen(soft_capped(4, 6, torch.float32))
    weight = unembed.weight.clone().requires_grad_()
    loss = chunked_cross_entropy(
        torch.randn(5, 4), torch.arange(5), replace(unembed, weight=weight)
    )
    loss.backward()
    assert weight.grad is not None
    assert unembed.bias is not None
    assert unembed.bias.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_value_is_computed(context: type):
    unembed = soft_capped(4, 6, torch.float64)
    orig, new = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    targets = torch.arange(5)
    expected = chunked_kl(orig, new, unembed), chunked_cross_entropy(new, targets, unembed)
    with context():
        kl = chunked_kl(orig, new, unembed, 2)
        cross_entropy = chunked_cross_entropy(new, targets, unembed, 2)
    assert not kl.requires_grad
    assert not cross_entropy.requires_grad
    torch.testing.assert_close((kl, cross_entropy), tuple(part.detach() for part in expected))


def test_no_more_tokens_than_the_chunk_size_have_logits_at_a_time(counting: CountRows):
    chunked_kl(torch.randn(7, 4), torch.randn(7, 4, requires_grad=True), counting, 3)
    assert counting.n_rows == [6, 6, 2]  # those of both passes in one product, three chunks


def test_default_chunk_bounds_the_bytes_of_logits(
    counting: CountRows, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sparsify.kernels.chunked.CPU_CHUNK_BYTES", 4 * 6 * 300)
    chunked_cross_entropy(torch.randn(700, 4), torch.arange(700) % 6, counting)
    assert counting.n_rows == [300, 300, 100]


def test_default_chunk_has_enough_tokens_to_be_worth_reading_the_unembedding(
    counting: CountRows, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sparsify.kernels.chunked.CPU_CHUNK_BYTES", 1)
    chunked_cross_entropy(torch.randn(300, 4), torch.arange(300) % 6, counting)
    assert counting.n_rows == [96, 96, 96, 12]


@pytest.mark.parametrize(("n_threads", "n_tokens"), [(1, 5), (2, 6), (4, 8), (48, 48)])
def test_each_thread_has_as_many_tokens_of_a_tile(
    n_threads: int, n_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    # Five tokens, rounded up to a multiple of the threads.
    monkeypatch.setattr("sparsify.kernels.chunked.CPU_TILE_BYTES", 4 * 6 * 5)
    assert tile_size(Unembedding(torch.zeros(4, 6))) == n_tokens


@pytest.mark.parametrize("offset", [0.0, -100.0, 1e4])
def test_an_offset_of_all_logits_costs_no_precision(offset: float):
    # As models have whose unembedding is not centred: only differences of logits count.
    unembed = Unembedding(torch.eye(50))
    orig, new = (torch.randn(9, 50) + offset for _ in range(2))
    targets = torch.randint(50, (9,))
    in_double = replace(unembed, weight=torch.eye(50, dtype=torch.float64))
    kl = full_kl(orig.double(), new.double(), in_double)
    assert_close(chunked_kl(orig, new, unembed), kl.float())
    ce = full_cross_entropy(new.double(), targets, in_double)
    assert_close(chunked_cross_entropy(new, targets, unembed), ce.float())


@pytest.mark.parametrize("rows_in_tile", [1, 2, 3, 100])
def test_tiles_make_no_difference(rows_in_tile: int, monkeypatch: pytest.MonkeyPatch):
    unembed = soft_capped(5, 11, torch.float64)
    orig, new = (torch.randn(17, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    targets = torch.randint(11, (17,))
    monkeypatch.setattr("sparsify.kernels.chunked.CPU_TILE_BYTES", 4 * 11 * rows_in_tile)
    both = chunked_kl(orig, new, unembed, 7) + chunked_cross_entropy(new, targets, unembed, 7)
    full = full_kl(orig, new, unembed) + full_cross_entropy(new, targets, unembed)
    assert_close(both, full)
    assert_close(grads_of(both, new), grads_of(full, new))


def test_tokens_can_be_left_out():
    unembed = soft_capped(5, 11, torch.float64)
    orig, new = (torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.rand(3, 4) < 0.5
    logs = (F.log_softmax(unembed(resid), dim=-1) for resid in (orig, new))
    log_orig, log_new = logs
    of_tokens = (log_orig.exp() * (log_orig - log_new)).sum(dim=-1)
    expected = (of_tokens * mask).sum() / mask.sum()
    kl = chunked_kl(orig[mask], new[mask], unembed)
    assert_close(kl, expected)
    assert_close(grads_of(kl, new), grads_of(expected, new))


def test_low_precision_logits_are_compared_in_float32():
    unembed = soft_capped(8, 50, torch.bfloat16)
    orig, new = (torch.randn(20, 8, dtype=torch.bfloat16) for _ in range(2))
    new.requires_grad_()
    kl = chunked_kl(orig, new, unembed, 6)
    normed = (unembed.normed(resid) for resid in (orig, new))
    products = (F.linear(rows, unembed.weight.T, unembed.bias) for rows in normed)
    log_orig, log_new = (unembed.transformed(p.float()).log_softmax(-1) for p in products)
    expected = (log_orig.exp() * (log_orig - log_new)).sum(-1).mean()
    torch.testing.assert_close(kl, expected.detach())
    assert grads_of(kl, new)[0].dtype == torch.bfloat16


def test_two_losses_of_one_residual_stream_add_up():
    unembed = soft_capped(4, 6, torch.float64)
    orig, resid = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    targets = torch.arange(5)
    both = chunked_kl(orig, resid, unembed) + chunked_cross_entropy(resid, targets, unembed)
    full = full_kl(orig, resid, unembed) + full_cross_entropy(resid, targets, unembed)
    torch.testing.assert_close(grads_of(both, resid), grads_of(full, resid))


def test_empty_input_is_rejected():
    with pytest.raises(ValueError, match=r"no rows to average over, its shape is \(0, 4\)"):
        chunked_kl(torch.randn(0, 4), torch.randn(0, 4), IDENTITY)


def test_chunk_size_below_one_is_rejected():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, given 0"):
        chunked_kl(torch.randn(2, 4), torch.randn(2, 4), IDENTITY, 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_compiled_kl_equals_full_logits(dtype: torch.dtype, chunk_size: int | None, scale: float):
    assert why_not_compiled(torch.device("cpu")) is None
    for unembed in (soft_capped(5, 11, dtype), Unembedding(scale * torch.randn(5, 7, dtype=dtype))):
        orig = torch.randn(3, 7, 5, dtype=dtype)
        new = torch.randn(3, 7, 5, dtype=dtype, requires_grad=True)
        kl = chunked_kl(orig, new, replace(unembed, is_compiled=True), chunk_size)
        expected = full_kl(orig, new, unembed)
        assert_close(kl, expected)
        assert_close(grads_of(kl, new), grads_of(expected, new))


def test_without_a_compiler_there_is_a_reason(tmp_path: Path):
    program = "import torch; from sparsify.kernels.compiled import why_not_compiled\n"
    program += "print(why_not_compiled(torch.device('cpu')))"
    environment = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "No working C++ compiler found" in done.stdout


def with_impossible_tokens(scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """An unembedding's bias that makes tokens 2 and 5 of 7 impossible, and two residual streams."""
    bias = torch.zeros(7).index_fill(0, torch.tensor([2, 5]), -math.inf)
    return bias, scale * torch.randn(9, 7), scale * torch.randn(9, 7)


@pytest.mark.parametrize(
    "is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "compiled"]
)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_kl_is_that_of_the_possible_tokens(scale: float, is_compiled: bool):
    bias, orig, new = with_impossible_tokens(scale)
    new.requires_grad_()
    unembed = Unembedding(torch.eye(7), bias, is_compiled=is_compiled)
    kl = chunked_kl(orig, new, unembed, 4)
    finite = [0, 1, 3, 4, 6]
    log_orig, log_new = (part[:, finite].double().log_softmax(dim=-1) for part in (orig, new))
    expected = (log_orig.exp() * (log_orig - log_new)).sum(dim=-1).mean()
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(full_kl(orig, new, unembed), kl, rtol=1e-5, atol=1e-6)
    (grad,), (expected_grad,) = grads_of(kl, new), grads_of(expected, new)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    assert not grad[:, [2, 5]].any()


@pytest.mark.parametrize(
    ("orig", "new", "expected"),
    [
        # A token that only the original model gives a chance; one that only the new one does,
        # where p_orig = (1, 0) and p_new = (1/2, 1/2), so the KL is log 2; a broken pass.
        ([0.0, 0.0], [0.0, -math.inf], math.inf),
        ([0.0, -math.inf], [0.0, 0.0], math.log(2)),
        ([0.0, math.nan], [0.0, 0.0], math.nan),
        ([0.0, 0.0], [math.nan, 0.0], math.nan),
    ],
)
def test_kl_of_impossible_tokens_by_hand(orig: list[float], new: list[float], expected: float):
    class AsGiven(Unembedding):
        """Logits are the residual stream itself, which a product with zeros would turn to NaN."""

        def products(self, normed: Tensor, buffer: Tensor) -> Tensor:
            return buffer[: len(normed)].copy_(normed)

    kl = chunked_kl(as_resid([orig]), as_resid([new]), AsGiven(torch.eye(2)))
    assert kl.item() == pytest.approx(expected, nan_ok=True)
    rows = (torch.tensor([row]).log_softmax(dim=-1) for row in (orig, new))
    assert kl_divergence(*rows).item() == pytest.approx(expected, nan_ok=True)
