"""Decoding and all gradients of an SAE, computed only where its code is not zero.

Of the code c, which is W input + b where it is not zero, a token uses some tens of many thousand
entries. With e_j the dictionary elements as the optimizer left them, n_j = max(|e_j|, EPS),
s_tj = c_tj / n_j, g the gradient of the output, h that of the code from elsewhere (a sparsity
term), and sums over active entries alone,

    output_t     = sum_j s_tj e_j + b_dec
    a_tj         = g_t . e_j / n_j + h_tj                    the gradient before the activation
    dL/dW_j      = sum_t a_tj input_t
    dL/db_j      = sum_t a_tj
    dL/dinput_t  = sum_j a_tj W_j
    dL/de_j      = sum_t s_tj g_t - e_j / n_j^2 sum_t s_tj g_t . e_j

The last term comes from the norm, and is absent where EPS replaces it. Elements that are held at
unit norm are used as they are: n_j is 1 and the last term absent. Nothing of the size of the
decoder is computed. Gradients cannot be differentiated again.

Dimensions: `token` is all leading dimensions of the input in one, `entry` the active entries of a
code, `active` the dictionary elements that are active on some token.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

EPS = 1e-12
"""Norms below this count as this, as in `F.normalize`."""

MAX_ACTIVE_SHARE = 0.04
MIN_DENSE_SIZE = 2**25
"""Active entries up to this share are worked with alone, if tokens x n_dict x d_act is this large.

On two cores with AVX-512, forward and backward pass together took as long as dense ones at a share
of 0.05 to 0.1 for 1024 x 3200 x 64 and larger sizes, at 0.015 for 512 x 1024 x 64 = 2^25 and at
0.005 for half of that; at a share of 0.01 they took half the time of dense ones at 1024 x 3200 x 64
and a third at 4096 x 2048 x 128. For one token of 12,288 x 768 it was less than a tenth up to 0.1.
"""

BLOCK_ROWS = 1024
"""Rows that are gathered at a time, few enough to stay in the cache."""


@dataclass(frozen=True)
class ActiveEntries:
    """Places where a code of shape `token n_dict` is not zero, and sums over its entries."""

    place: Int[Tensor, " entry"]
    """Index into the flat code, ascending."""

    token: Int[Tensor, " entry"]
    element: Int[Tensor, " entry"]

    token_start: Int[Tensor, " token_and_end"]
    """The first entry of each token, and the number of entries."""

    by_element: Int[Tensor, " entry"]
    """The entries in the order of their elements."""

    active: Int[Tensor, " active"]
    """The elements that occur, ascending."""

    active_start: Int[Tensor, " active_and_end"]
    """The place in `by_element` of the first entry of each of them, and the number of entries."""

    @staticmethod
    def at(place: Int[Tensor, " entry"], n_dict: int, size: int) -> "ActiveEntries":
        """The entries at ascending places of a flat code of this size."""
        token = place // n_dict
        element = place - n_dict * token
        ordered, by_element = torch.sort(element.int(), stable=True)
        active, counts = torch.unique_consecutive(ordered, return_counts=True)
        return ActiveEntries(
            place=place,
            token=token,
            element=element,
            token_start=torch.searchsorted(place, torch.arange(0, size + n_dict, n_dict)),
            by_element=by_element,
            active=active.long(),
            active_start=F.pad(counts.cumsum(0), (1, 0)),
        )

    def sums_by_token(
        self, values: Float[Tensor, " entry"], rows: Float[Tensor, "n_dict width"]
    ) -> Float[Tensor, "token width"]:
        """For each token, the sum of values times rows of elements."""
        return _weighted_sums(rows, self.element, self.token_start, values)

    def sums_by_element(
        self, values: Float[Tensor, " entry"], rows: Float[Tensor, "token width"]
    ) -> Float[Tensor, "active width"]:
        """For each active element, the sum of values times rows of tokens."""
        order = self.by_element
        return _weighted_sums(rows, self.token.take(order), self.active_start, values.take(order))

    def totals(self, values: Float[Tensor, " entry"], n_dict: int) -> Float[Tensor, " n_dict"]:
        """For each element, the sum of values."""
        return values.new_zeros(n_dict).index_add_(0, self.element, values)

    def dots(
        self, of_token: Float[Tensor, "token width"], of_element: Float[Tensor, "n_dict width"]
    ) -> Float[Tensor, " entry"]:
        """For each entry, the dot product of the rows of its token and its element."""
        _trigger_beta_warning()
        zeros = torch.sparse_csr_tensor(
            self.token_start,
            self.element,
            of_token.new_zeros(len(self.element)),
            (len(of_token), len(of_element)),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(zeros, of_token, of_element.T).values()


def find_active(c: Float[Tensor, "*sample n_dict"], d_act: int) -> ActiveEntries | None:
    """The active entries of a code if it pays to work with them alone, else None.

    On a GPU it is None: the host would have to wait for their number.

    Args:
        c: The code.
        d_act: Width of the activation.
    """
    if c.device.type != "cpu" or c.dtype not in (torch.float32, torch.float64):
        return None
    if c.numel() * d_act < MIN_DENSE_SIZE:
        return None
    # NumPy finds them two to four times as fast as `torch.nonzero`. NaN is active.
    is_active = c.detach().numpy() != 0
    if np.count_nonzero(is_active) > MAX_ACTIVE_SHARE * is_active.size:
        return None
    return ActiveEntries.at(torch.from_numpy(np.flatnonzero(is_active)), c.shape[-1], c.numel())


def decode_active(
    entries: ActiveEntries,
    c: Float[Tensor, "*sample n_dict"],
    input: Float[Tensor, "*sample d_act"],
    encoder_weight: Float[Tensor, "n_dict d_act"],
    encoder_bias: Float[Tensor, " n_dict"],
    elements: Float[Tensor, "n_dict d_out"],
    decoder_bias: Float[Tensor, " d_out"],
    *,
    is_unit_norm: bool = False,
    row_sparse_grads: bool = False,
) -> tuple[Float[Tensor, "*sample n_dict"], Float[Tensor, "*sample d_out"]]:
    """The code, and the sum of unit-norm dictionary elements that it stands for, plus the bias.

    Args:
        entries: The active entries of `c`.
        c: A code whose active entries are those of encoder_weight input + encoder_bias. Its own
            graph is not used: gradients of the results go directly to the other tensors.
        input: Input of the encoder.
        encoder_weight: The encoder's weight.
        encoder_bias: The encoder's bias.
        elements: Dictionary elements.
        decoder_bias: The decoder's bias.
        is_unit_norm: Whether elements are used as they are. If not, they are scaled to unit norm
            first.
        row_sparse_grads: Whether the gradients of the two matrices are sparse COO tensors that hold
            the rows of active elements alone.
    """
    c_rows, output = _DecodeActive.apply(
        entries,
        is_unit_norm,
        row_sparse_grads,
        c.detach().reshape(-1, c.shape[-1]),
        input.reshape(-1, input.shape[-1]),
        encoder_weight,
        encoder_bias,
        elements,
        decoder_bias,
    )
    return c_rows.view_as(c), output.view(*c.shape[:-1], output.shape[-1])


class _DecodeActive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch's stub does not declare what a context keeps
        entries: ActiveEntries,
        is_unit_norm: bool,
        row_sparse_grads: bool,
        c: Tensor,
        input: Tensor,
        encoder_weight: Tensor,
        encoder_bias: Tensor,
        elements: Tensor,
        decoder_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        scaled, norms = c.take(entries.place), None
        if not is_unit_norm:
            norms = _norms(elements, entries.active)
            scaled /= norms.take(entries.element)
        ctx.save_for_backward(input, encoder_weight, elements, norms, scaled)
        ctx.set_materialize_grads(False)
        ctx.entries, ctx.row_sparse_grads = entries, row_sparse_grads
        return c, entries.sums_by_token(scaled, elements).add_(decoder_bias)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]  # two outputs
        ctx: Any, grad_c: Tensor | None, grad_output: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        input, encoder_weight, elements, norms, scaled = ctx.saved_tensors
        entries: ActiveEntries = ctx.entries
        n_dict = len(elements)
        no_grad = elements.new_zeros(len(input), elements.shape[1])
        g = no_grad if grad_output is None else grad_output.contiguous()
        dots = entries.dots(g, elements)
        a = dots if norms is None else dots / norms.take(entries.element)
        if grad_c is not None:
            a = a + grad_c.take(entries.place)

        def of_rows(rows: Tensor) -> Tensor:
            return _from_rows(rows, entries.active, n_dict, ctx.row_sparse_grads)

        grads = (
            lambda: entries.sums_by_token(a, encoder_weight),
            lambda: of_rows(entries.sums_by_element(a, input)),
            lambda: entries.totals(a, n_dict),
            lambda: of_rows(_element_grads(entries, g, elements, norms, scaled, dots)),
            lambda: g.sum(dim=0),
        )
        needs = ctx.needs_input_grad[4:]
        wanted = (grad() if need else None for grad, need in zip(grads, needs, strict=True))
        return None, None, None, None, *wanted


def _element_grads(
    entries: ActiveEntries,
    g: Tensor,
    elements: Tensor,
    norms: Tensor | None,
    scaled: Tensor,
    dots: Tensor,
) -> Tensor:
    rows = entries.sums_by_element(scaled, g)
    if norms is None:
        return rows
    along = entries.totals(scaled * dots, len(elements)) / norms.square()
    along = torch.where(norms > EPS, along, 0)[entries.active, None]
    blocks = zip(*(t.split(BLOCK_ROWS) for t in (rows, along, entries.active)), strict=True)
    for rows_part, along_part, active in blocks:
        rows_part.addcmul_(elements[active], along_part, value=-1)
    return rows


def _norms(elements: Tensor, active: Tensor) -> Tensor:
    """Norms of the active elements; one at the others."""
    norms = elements.new_ones(len(elements))
    for part in active.split(BLOCK_ROWS):
        norms[part] = torch.linalg.vector_norm(elements[part], dim=1).clamp_(min=EPS)
    return norms


def _from_rows(rows: Tensor, active: Tensor, n_dict: int, is_sparse: bool) -> Tensor:
    if len(active) == n_dict:
        return rows
    size = (n_dict, rows.shape[1])
    if not is_sparse or 2 * len(active) > n_dict:
        return rows.new_zeros(size).index_copy_(0, active, rows)
    return torch.sparse_coo_tensor(
        active[None], rows, size, is_coalesced=True, check_invariants=False
    )


def _weighted_sums(rows: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """For each stretch of `index`, the sum of weights times the rows that it names."""
    return F.embedding_bag(
        index, rows, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


@cache
def _trigger_beta_warning() -> None:
    """Let torch give its warning that CSR tensors are in beta, once a process, unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.tensor([0, 0])
        torch.sparse_csr_tensor(index, index[:0], torch.zeros(0), (1, 1), check_invariants=False)
