"""Mean losses over logits of which only a chunk exists at a time.

The logits of a batch are its largest tensor: tokens times vocabulary. But a loss that is a mean
over tokens needs them one token at a time. So walk over chunks of tokens, and for each compute its
logits, its part of the loss and its part of the gradient, and drop the logits before the next. The
gradients, as small as the residual stream, are computed in the forward pass and kept; the backward
pass only scales them.

Logits of any precision are turned into probabilities in float32 at least. Gradients cannot be
differentiated again.

Dimensions: `*sample` is any leading batch and position dimensions.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

Unembed = Callable[[Float[Tensor, "*sample d_model"]], Float[Tensor, "*sample d_vocab"]]
"""From the final residual stream to logits: each row by itself, and no rows if given none."""

RowLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""`loss(logits, rows, with_grad)`: sum of the loss over these rows, and its gradient with respect
to their logits if asked for. It must not write to the logits, which a backward pass may need."""

# On one or two CPU cores 2 to 16 MiB were equally fast, and 32 MiB took 1.3 to 1.6 times as long
# (vocabulary 4096). An accelerator needs larger pieces to be busy.
CPU_CHUNK_BYTES = 8 * 2**20
ACCELERATOR_CHUNK_BYTES = 256 * 2**20
# Each chunk reads the whole unembedding, which must be worth it: with a vocabulary of 50,257 the KL
# of 41 tokens at a time (8 MiB) took 1.6 times as long as of 128 at width 768, 1.3 times at 64.
MIN_CHUNK_TOKENS = 128


def chunked_kl(
    orig_resid: Float[Tensor, "*sample d_model"],
    new_resid: Float[Tensor, "*sample d_model"],
    unembed: Unembed,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """KL(orig || new) of the distributions over the next token, in nats, averaged over tokens.

    KL(orig || new) is the sum of p_orig * (log p_orig - log p_new) over the vocabulary. The
    gradient reaches `new_resid` only, not `orig_resid` and not the parameters of `unembed`.

    Args:
        orig_resid: Final residual stream of the model as it is.
        new_resid: Final residual stream of the spliced model.
        unembed: Final norm and unembedding.
        chunk_size: Tokens whose logits exist at a time. None takes as many as are fast.
    """
    orig_rows = orig_resid.detach().flatten(end_dim=-2)

    def kl_of_rows(logits: Tensor, rows: slice, with_grad: bool) -> tuple[Tensor, Tensor | None]:
        log_new = _log_softmax(logits)
        with torch.no_grad():
            log_orig = _log_softmax(unembed(orig_rows[rows]))
        p_orig = log_orig.exp()
        total = torch.dot(p_orig.flatten(), log_orig.sub_(log_new).flatten())
        # d KL / d logits_new = p_new - p_orig
        return total, log_new.exp_().sub_(p_orig) if with_grad else None

    return chunked_mean(new_resid, unembed, kl_of_rows, chunk_size=chunk_size)


def chunked_cross_entropy(
    resid: Float[Tensor, "*sample d_model"],
    targets: Int[Tensor, "*sample"],
    unembed: Unembed,
    params: Sequence[Tensor] = (),
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the target tokens in nats, averaged over tokens.

    Args:
        resid: Final residual stream.
        targets: The token that should follow each position.
        unembed: Final norm and unembedding.
        params: Tensors that `unembed` uses and that get gradients along with `resid`.
        chunk_size: Tokens whose logits exist at a time. None takes as many as are fast.
    """
    flat_targets = targets.flatten()

    def ce_of_rows(logits: Tensor, rows: slice, with_grad: bool) -> tuple[Tensor, Tensor | None]:
        log_p = _log_softmax(logits)
        index = flat_targets[rows].unsqueeze(-1)
        total = -log_p.gather(-1, index).sum()
        if not with_grad:
            return total, None
        # d CE / d logits = p - one_hot(target)
        minus_one = torch.full_like(index, -1, dtype=log_p.dtype)
        return total, log_p.exp_().scatter_add_(-1, index, minus_one)

    return chunked_mean(resid, unembed, ce_of_rows, params, chunk_size)


def chunked_mean(
    resid: Float[Tensor, "*sample d_model"],
    unembed: Unembed,
    row_loss: RowLoss,
    params: Sequence[Tensor] = (),
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Mean over rows of a loss of `unembed(resid)`, with its gradient, chunk by chunk.

    Without gradients (none enabled, or none required) only the value is computed.

    Args:
        resid: What the logits are computed from. It gets a gradient.
        unembed: From `resid` to logits.
        row_loss: The loss of some rows and its gradient.
        params: Tensors that `unembed` uses and that get gradients too.
        chunk_size: Rows whose logits exist at a time. None takes as many as are fast.

    Raises:
        ValueError: `resid` has no rows, or the chunk size is not positive.
    """
    rows = resid.flatten(end_dim=-2)
    if len(rows) == 0:
        raise ValueError(f"resid has no rows to average over, its shape is {tuple(resid.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, given {chunk_size}")
    size = chunk_size or fast_chunk_size(rows, unembed)
    learned = [param for param in params if param.requires_grad]
    if torch.is_grad_enabled() and (rows.requires_grad or learned):
        return _ChunkedMean.apply(unembed, row_loss, size, rows, *learned)
    with torch.no_grad():
        sums = [row_loss(unembed(rows[part]), part, False)[0] for part in _chunks(len(rows), size)]
    return torch.stack(sums).sum() / len(rows)


class _ChunkedMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        unembed: Unembed,
        row_loss: RowLoss,
        size: int,
        rows: Tensor,
        *params: Tensor,
    ) -> Tensor:
        sums = []
        row_grads = torch.empty_like(rows)
        param_grads = [torch.zeros_like(param, dtype=_wide(param.dtype)) for param in params]
        for part in _chunks(len(rows), size):
            chunk = rows[part].detach().requires_grad_()
            with torch.enable_grad():
                logits = unembed(chunk)
            total, logit_grads = row_loss(logits.detach(), part, True)
            assert logit_grads is not None
            sums.append(total)
            row_grads[part], *grads = torch.autograd.grad(
                logits, (chunk, *params), logit_grads.to(logits.dtype)
            )
            for param_grad, grad in zip(param_grads, grads, strict=True):
                param_grad += grad
        for grad in (row_grads, *param_grads):
            grad /= len(rows)
        ctx.save_for_backward(
            row_grads,
            *(grad.to(param.dtype) for grad, param in zip(param_grads, params, strict=True)),
        )
        return torch.stack(sums).sum() / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # one output
        saved: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]  # not in torch's stub
        return None, None, None, *(grad * part for part in saved)


def _chunks(n_rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def fast_chunk_size(rows: Float[Tensor, "token d_model"], unembed: Unembed) -> int:
    """Tokens whose logits fill a chunk of the size that is fast on the device of `rows`."""
    with torch.no_grad():
        d_vocab = unembed(rows[:0]).shape[-1]
    n_bytes = CPU_CHUNK_BYTES if rows.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    return max(MIN_CHUNK_TOKENS, n_bytes // (4 * d_vocab))


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=_wide(logits.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
