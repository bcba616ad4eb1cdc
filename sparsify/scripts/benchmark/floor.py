"""The floating-point operations that a training step cannot avoid, and how fast they could be."""

import time

import torch

from sparsify.scripts.benchmark.shapes import Shape
from sparsify.training.forward_plan import ForwardPlan

FORMULA = """\
floor = floating-point operations of matrix products / measured rate of matrix products, where
  a block, forward           2 (4 d^2 + 2 d d_mlp) + 2 n_ctx d        per token; causal attention
  its backward pass          2 (4 d^2 + 2 d d_mlp) + 4 n_ctx d        to its input alone
  blocks                     shared prefix, raw suffix, and spliced suffix forward and backward
  logits (unless local)      3 * 2 d d_vocab                          raw, spliced, gradient
  the SAE                    2 d n_dict + 4 * 2 d L0                  encode; the rest is sparse
"""


def step_flops(shape: Shape, plan: ForwardPlan, l0: float) -> float:
    """Operations of the products of one step, see `FORMULA`."""
    d = shape.d_model
    products = 2 * (4 * d**2 + 2 * d * 4 * d)
    attention = 2 * shape.n_ctx * d
    raw_blocks = max(plan.start, plan.raw_stop)
    spliced_blocks = 0 if plan.is_local else plan.spliced_stop - plan.start
    per_token = (raw_blocks + 2 * spliced_blocks) * products
    per_token += (raw_blocks + 3 * spliced_blocks) * attention
    per_token += 3 * 2 * d * shape.d_vocab * plan.needs_logits
    per_token += 2 * d * shape.n_dict + 4 * 2 * d * l0
    return per_token * shape.n_tokens


def matmul_rate(device: torch.device, size: int = 2048, n_times: int = 7) -> float:
    """Operations per second of a float32 product of square matrices, the best of several."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(n_times):
        synchronize(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
