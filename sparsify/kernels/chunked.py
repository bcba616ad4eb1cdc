"""Mean losses over logits of which only a chunk exists at a time.

The logits of a batch are its largest tensor: tokens times vocabulary. But a loss that is a mean
over tokens needs them one token at a time. So walk over chunks of tokens. For each, compute the
logits, the loss, and its gradient, which takes the place of the logits in memory. The gradient with
respect to the final residual stream, which is as small as the stream, is thus computed in the
forward pass and kept; the backward pass only scales it.

A chunk is as large as makes its matrix products fast. Operations on single logits go over it in
tiles, which stay in the cache.

Logits of any precision are turned into probabilities in float32 at least. Gradients cannot be
differentiated again. To leave tokens out, give the residual streams of the others.

Dimensions: `*sample` is any leading batch and position dimensions, `row` the same flattened.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsify.kernels.compiled import compiled_kl_of_rows
from sparsify.kernels.unembedding import Unembedding

TileLoss = Callable[[Tensor, Tensor | None, slice, bool], Tensor]
"""`loss(logits, orig_logits, rows, with_grad)`: the sum over these rows of the batch, in float32 at
least. With `with_grad` the gradient takes the place of `logits`. It may also
overwrite `orig_logits`."""

CPU_CHUNK_BYTES = 2 * 2**20
# Each chunk reads the whole unembedding, so it must not be too small: on two CPU cores the KL of
# 256 tokens with a vocabulary of 50,257 and width 768 took 0.48 s in chunks of 48, 0.44 s in chunks
# of 64, 0.40 s of 96, 0.37 s of 128 and of 256. The logits of 96 take 39 MB in both passes.
MIN_CHUNK_TOKENS = 96
# The KL of 4096 tokens with a vocabulary of 4096 and width 128 took 0.095 s in tiles of this size,
# 0.100 s in tiles of half and 0.107 s of a quarter of it. Twice as much memory saved 0.003 s.
CPU_TILE_BYTES = 2**20
# An accelerator needs larger pieces to be busy, and does not have such a cache.
ACCELERATOR_CHUNK_BYTES = 256 * 2**20


def chunked_kl(
    orig_resid: Float[Tensor, "*sample d_model"],
    new_resid: Float[Tensor, "*sample d_model"],
    unembed: Unembedding,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """KL(orig || new) of the distributions over the next token, in nats, averaged over tokens.

    KL(orig || new) is the sum of p_orig * (log p_orig - log p_new) over the vocabulary. The
    original logits count as constant: gradients reach `new_resid`, and parameters of `unembed` that
    require them through the new logits alone. The KL of equal passes is zero except for rounding,
    which has either sign: a product may round a row of logits by where it stands. A token of
    p_orig = 0, such as one whose logit is -inf, adds nothing; with p_orig > 0 and p_new = 0 the KL
    is infinite.

    Args:
        orig_resid: Final residual stream of the model as it is.
        new_resid: Final residual stream of the spliced model.
        unembed: Final norm and unembedding.
        chunk_size: Tokens whose logits exist at a time. None takes as many as are fast.

    Raises:
        ValueError: There are no tokens, or the chunk size is not positive.
    """

    def kl_of_tile(logits: Tensor, orig: Tensor | None, rows: slice, with_grad: bool) -> Tensor:
        assert orig is not None
        if unembed.is_compiled and with_grad:
            return compiled_kl_of_rows()(orig, logits).sum()
        of_new, of_orig = _softmax(logits), _softmax(orig)
        shift = of_orig.top_logit - of_new.top_logit - (of_orig.top_log_p - of_new.top_log_p)
        log_ratio = orig.sub_(logits).sub_(shift)  # log p_orig - log p_new
        if with_grad:  # d KL / d logits = p_new - p_orig
            torch.sub(of_new.p, of_orig.p, out=logits)
        return _sum_of_products(of_orig.p, log_ratio)

    return _chunked_mean(new_resid, unembed, kl_of_tile, chunk_size, orig_resid)


def chunked_cross_entropy(
    resid: Float[Tensor, "*sample d_model"],
    targets: Int[Tensor, "*sample"],
    unembed: Unembedding,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the target tokens in nats, averaged over tokens.

    Gradients reach `resid`, and parameters of `unembed` that require them.

    Args:
        resid: Final residual stream.
        targets: The token that should follow each position.
        unembed: Final norm and unembedding.
        chunk_size: Tokens whose logits exist at a time. None takes as many as are fast.

    Raises:
        ValueError: There are no tokens, or the chunk size is not positive.
    """
    flat_targets = targets.flatten()

    def ce_of_tile(logits: Tensor, orig: Tensor | None, rows: slice, with_grad: bool) -> Tensor:
        p, top_logit, top_log_p = _softmax(logits)
        index = flat_targets[rows].unsqueeze(-1)
        loss = (top_logit - logits.gather(-1, index) - top_log_p).sum()
        if with_grad:  # d CE / d logits = p - one_hot(target)
            minus_one = torch.full_like(index, -1, dtype=logits.dtype)
            logits.copy_(p).scatter_add_(-1, index, minus_one)
        return loss

    return _chunked_mean(resid, unembed, ce_of_tile, chunk_size)


def _chunked_mean(
    resid: Float[Tensor, "*sample d_model"],
    unembed: Unembedding,
    tile_loss: TileLoss,
    chunk_size: int | None,
    orig_resid: Float[Tensor, "*sample d_model"] | None = None,
) -> Float[Tensor, ""]:
    if resid.numel() == 0:
        raise ValueError(f"resid has no rows to average over, its shape is {tuple(resid.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, given {chunk_size}")
    # The norm of the pass that learns stays outside: its gradient is autograd's own.
    rows = unembed.normed(resid).flatten(end_dim=-2)
    orig_resid = None if orig_resid is None else orig_resid.flatten(end_dim=-2)
    size = min(chunk_size or fast_chunk_size(unembed), len(rows))
    walk = partial(_walk, unembed, tile_loss, size, orig_resid)
    if not torch.is_grad_enabled():
        return walk(rows, (False, False, False))[0]
    return _ChunkedMean.apply(walk, rows, unembed.weight, unembed.bias)


class _ChunkedMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch's stub does not declare what a context keeps
        walk: Callable[[Tensor, Sequence[bool]], tuple[Tensor, list[Tensor | None]]],
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        mean, grads = walk(rows, ctx.needs_input_grad[1:])
        ctx.save_for_backward(*grads)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # one output
        return None, *(None if part is None else grad * part for part in ctx.saved_tensors)


def _walk(
    unembed: Unembedding,
    tile_loss: TileLoss,
    size: int,
    orig_resid: Tensor | None,
    rows: Tensor,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Mean, and those of its gradients by rows, weight and bias that are needed."""
    n_passes = 1 if orig_resid is None else 2
    buffer = rows.new_empty(n_passes * size, unembed.d_vocab)
    at_tile = partial(_at_tile, unembed, tile_loss)
    sums: list[Tensor] = []
    of_rows, of_weight, of_bias = grads = [
        torch.zeros_like(tensor, dtype=_wide(rows.dtype)) if tensor is not None and needed else None
        for tensor, needed in zip((rows, unembed.weight, unembed.bias), needs_grad, strict=True)
    ]
    for part in _pieces(len(rows), size):
        # One product for both passes: with more rows it is faster than two.
        both = rows[part]
        if orig_resid is not None:
            both = torch.cat([both, unembed.normed(orig_resid[part])])
        products = unembed.products(both, buffer)
        logits = products[: part.stop - part.start]
        orig = None if orig_resid is None else products[len(logits) :]
        for tile in _pieces(len(logits), tile_size(unembed)):
            of_batch = slice(part.start + tile.start, part.start + tile.stop)
            orig_tile = None if orig is None else orig[tile]
            sums.append(at_tile(logits[tile], orig_tile, of_batch, any(needs_grad)))
        # The gradient is now where the logits were.
        if of_rows is not None:
            of_rows[part] = torch.mm(logits, unembed.weight.T)
        if of_weight is not None:
            of_weight += torch.mm(rows[part].T, logits)
        if of_bias is not None:
            of_bias += logits.sum(dim=0)
    return torch.stack(sums).sum() / len(rows), [
        None if grad is None else grad.div_(len(rows)).to(rows.dtype) for grad in grads
    ]


def _at_tile(
    unembed: Unembedding,
    tile_loss: TileLoss,
    products: Tensor,
    orig_products: Tensor | None,
    rows: slice,
    with_grad: bool,
) -> Tensor:
    """The loss of some rows. With `with_grad` its gradient takes the place of `products`."""
    wide = _wide(products.dtype)
    if unembed.transform is None and products.dtype == wide:
        return tile_loss(products, orig_products, rows, with_grad)
    leaf = products.to(wide, copy=True).requires_grad_(with_grad)
    with torch.set_grad_enabled(with_grad):
        logits = unembed.transformed(leaf)
    orig = None if orig_products is None else unembed.transformed(orig_products.to(wide, copy=True))
    of_logits = logits.detach().clone()
    total = tile_loss(of_logits, orig, rows, with_grad)
    if with_grad:
        (grad,) = torch.autograd.grad(logits, leaf, of_logits)
        products.copy_(grad)
    return total


class _Softmax(NamedTuple):
    """Probabilities, and two columns: log p = logit - top_logit + top_log_p."""

    p: Tensor
    top_logit: Tensor
    top_log_p: Tensor


def _softmax(logits: Float[Tensor, "row d_vocab"]) -> _Softmax:
    """Probabilities, and two columns of the likeliest token of each row for their logarithms.

    On a CPU a whole softmax, with its exponentials, takes half to two thirds of the time of torch's
    `exp` alone, and a maximum a tenth, so `exp` is not used. Both columns are returned, since their
    difference would be rounded at the size of the logits.
    """
    p = F.softmax(logits, dim=-1)
    top_p = p.amax(dim=-1, keepdim=True)
    return _Softmax(p, logits.amax(dim=-1, keepdim=True), top_p.log())


def _sum_of_products(
    p: Float[Tensor, "row d_vocab"], log_ratio: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, ""]:
    """Sum of p * log_ratio, where 0 times an infinite or undefined number is 0."""
    total = torch.dot(p.flatten(), log_ratio.flatten())
    # The mask takes half as long as all else. A GPU would have to be waited for to leave it out.
    if can_look(total) and total.isfinite():
        return total
    return torch.dot(p.flatten(), log_ratio.masked_fill_(p == 0, 0.0).flatten())


def can_look(value: Tensor) -> bool:
    """Whether a number can be looked at without waiting for a device."""
    return value.device.type == "cpu"


def _pieces(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def fast_chunk_size(unembed: Unembedding) -> int:
    """Tokens whose logits exist at a time: as many as are fast on the device of the weights."""
    is_cpu = unembed.weight.device.type == "cpu"
    n_bytes = CPU_CHUNK_BYTES if is_cpu else ACCELERATOR_CHUNK_BYTES
    return max(MIN_CHUNK_TOKENS, n_bytes // (4 * unembed.d_vocab))


def tile_size(unembed: Unembedding) -> int:
    """Tokens of a chunk whose logits, and as many probabilities, are worked on at a time.

    On a CPU a multiple of the number of threads, which share the rows of a softmax.
    """
    if unembed.is_compiled or unembed.weight.device.type != "cpu":
        return fast_chunk_size(unembed)
    n_threads = torch.get_num_threads()
    return n_threads * math.ceil(CPU_TILE_BYTES / (4 * unembed.d_vocab * n_threads))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
