"""Optimizers: Adam for SAEs, Muon with Adam for language models."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Muon, Optimizer
from torch.optim.adam import adam

from sparsify.training.state_check import (
    MisfitError,
    check_like,
    check_tensor,
    describe,
    require,
)

BLOCK_LISTS = {"blocks", "layers"}

STATE_NAMES: dict[type[Optimizer], set[str]] = {
    Adam: {"step", "exp_avg", "exp_avg_sq"},
    Muon: {"momentum_buffer"},
}
"""What an optimizer keeps for a parameter that it has moved."""

BLOCK_NUMEL = 2**21
"""Weights that move at a time under a row-sparse gradient, which is dense for so long. A matrix of
46,080 x 768 with gradients in 7,580 rows took 48 to 54 ms of one core in blocks of 2^19 to 2^23,
and 42 ms with a dense gradient that was already there; blocks of 2^16 took four times as long."""


def build_adam(parameters: Iterable[nn.Parameter], lr: float) -> Adam:
    """Adam with torch's default betas, in fused kernels; it takes row-sparse gradients."""
    return RowSparseAdam(parameters, lr=lr, fused=True)


def build_muon(
    named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float, adam_lr: float
) -> list[Optimizer]:
    """Optimizers of a language model: Muon for the matrices of its blocks, Adam for the rest.

    The rest is embeddings, unembedding, biases and norms. Weights do not decay.

    Args:
        named_parameters: All parameters. A matrix is in a block if `blocks` or `layers` is a part
            of its name, and must be stored with two dimensions.
        lr: Learning rate of Muon, by which a square matrix moves in spectral norm.
        adam_lr: Learning rate of Adam.
    """
    matrices, others = [], []
    for name, parameter in named_parameters:
        is_block_matrix = parameter.ndim == 2 and BLOCK_LISTS & set(name.split("."))
        (matrices if is_block_matrix else others).append(parameter)
    if not matrices:
        raise ValueError("Muon has nothing to do: no matrix is in a part named blocks or layers")
    muon_class = Muon if matrices[0].is_cuda else Float32Muon
    return [
        muon_class(matrices, lr=lr, weight_decay=0.0),
        AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


class RowSparseAdam(Adam):
    """`torch.optim.Adam` that also takes gradients which are sparse COO tensors of whole rows.

    Unlike `torch.optim.SparseAdam` it moves every row, as the dense gradient would: where that is
    zero, the moments decay and the weights keep moving. State and settings are those of the
    parent, so either can load the other's state.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step."""
        loss = _loss_of(closure)
        sparse_grads: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    sparse_grads.append((parameter, parameter.grad))
                    self._step_by_blocks(parameter, parameter.grad.coalesce(), group)
                    parameter.grad = None  # the parent's step leaves it out
        super().step()
        for parameter, gradient in sparse_grads:
            parameter.grad = gradient
        return loss

    def _step_by_blocks(
        self, parameter: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]
    ) -> None:
        # `Any`: torch keeps settings of different types in one dictionary.
        assert not group["amsgrad"], "build_adam does not set it"
        assert parameter.is_contiguous(), "the fused kernel reads rows as one piece of memory"
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        n_rows = max(1, BLOCK_NUMEL // parameter[0].numel())
        starts = torch.arange(0, len(parameter) + n_rows, n_rows, device=parameter.device)
        (index,), values = gradient.indices(), gradient.values()
        bounds = torch.searchsorted(index, starts).tolist()
        dense = torch.zeros_like(parameter[:n_rows])
        for start, first, last in zip(starts.tolist(), bounds, bounds[1:], strict=False):
            rows, within = slice(start, start + n_rows), index[first:last] - start
            dense.index_copy_(0, within, values[first:last])
            adam(
                [parameter[rows]],
                [dense[: len(parameter) - start]],
                [state["exp_avg"][rows]],
                [state["exp_avg_sq"][rows]],
                [],
                [state["step"].clone()],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )
            dense.index_fill_(0, within, 0)
        state["step"] += 1


def checked_state(optimizer: Optimizer, saved: object, n_steps: int, entry: str) -> dict[int, Any]:
    """Return the state of an optimizer by the number of the parameter, if it fits its parameters.

    Tensors are new, and laid out in memory as the parameters: the fused kernels rely on that.

    Args:
        optimizer: The one that will load it.
        saved: What was its `state_dict()`. Its settings are not read: they are those of the config.
        n_steps: Steps that it can have taken.
        entry: Name of the part.

    Raises:
        MisfitError: It does not fit.
    """
    groups = optimizer.state_dict()["param_groups"]
    check_like(saved, {"state": {}, "param_groups": [{"params": None} for _ in groups]}, entry)
    assert isinstance(saved, dict), "which has just been seen"
    for group, own in zip(saved["param_groups"], groups, strict=True):
        if group["params"] != own["params"]:
            raise MisfitError(f"{entry}.param_groups has other parameters, or in another order")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    checked = {}
    for number, found in saved["state"].items():
        place = f"{entry}.state.{describe(number)}"
        is_known = type(number) is int and number in range(len(parameters))
        require(is_known, number, "the number of a parameter", place)
        checked[number] = _checked_entries(optimizer, found, parameters[number], n_steps, place)
    return checked


def _checked_entries(
    optimizer: Optimizer, found: object, parameter: Tensor, n_steps: int, entry: str
) -> dict[str, Tensor]:
    require(isinstance(found, dict), found, "a dict", entry)
    assert isinstance(found, dict)
    for kind, names in STATE_NAMES.items():
        if isinstance(optimizer, kind):
            require(found.keys() == names, sorted(map(str, found)), str(sorted(names)), entry)
    checked = {}
    for name, value in found.items():
        place = f"{entry}.{name}"
        if name == "step":
            step = check_tensor(value, torch.zeros((), dtype=torch.float32), place).item()
            require(0 <= step <= n_steps, step, f"0 to {n_steps}", place)
            checked[name] = torch.tensor(step)
            continue
        tensor = check_tensor(value, parameter, place)
        if name == "exp_avg_sq":
            require(bool((tensor >= 0).all()), tensor, "one without negative numbers", place)
        checked[name] = torch.empty_like(parameter).copy_(tensor)
    return checked


def _loss_of(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Float32Muon(Muon):
    """`torch.optim.Muon` in float32.

    Torch's own orthogonalises in bfloat16, which a CPU without bfloat16 units only emulates: a step
    on the matrices of a model of 4 blocks of width 192 takes 0.29 s of one core, and 0.08 s here.
    Parameters, state and settings are those of the parent, except that `adjust_lr_fn` is ignored
    and the parent's default used: tall matrices take steps larger by the root of rows / columns.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step."""
        loss = _loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_matrix(parameter, parameter.grad, group)
        return loss

    def _step_matrix(
        self, parameter: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]
    ) -> None:
        # `Any`: torch keeps settings of different types in one dictionary.
        momentum, state = group["momentum"], self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(average, momentum) if group["nesterov"] else average
        update = orthogonalize(direction, group["ns_coefficients"], group["ns_steps"])
        n_rows, n_columns = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * max(1.0, n_rows / n_columns) ** 0.5)


def orthogonalize(
    matrix: Float[Tensor, "rows columns"], coefficients: tuple[float, float, float], n_steps: int
) -> Float[Tensor, "rows columns"]:
    """The matrix with all its singular values moved close to one.

    Each Newton-Schulz step maps a singular value s to a*s + b*s^3 + c*s^5. With the coefficients of
    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon) five steps take every value that
    is not tiny to between about 0.7 and 1.2.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(n_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
