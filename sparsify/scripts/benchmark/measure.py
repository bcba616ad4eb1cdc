"""Times a training step beside the plain reference step, in one process."""

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.sae_transformer import SAETransformer
from sparsify.scripts.benchmark.floor import matmul_rate, step_flops, synchronize
from sparsify.scripts.benchmark.reference_step import ReferenceStepper
from sparsify.scripts.benchmark.shapes import SHAPES, Shape
from sparsify.tlens.hooked_model import TLENS_HAS_HOOKED_TRANSFORMER, TLensModel
from sparsify.training.compilation import compile_kernels
from sparsify.training.config import TrainingConfig
from sparsify.training.forward_passes import forward_passes
from sparsify.training.forward_plan import derive_plan
from sparsify.training.memory import peak_bytes
from sparsify.training.precision import set_precision
from sparsify.training.sae_trainer import SAETrainer

TARGET_L0 = 32
LR = 1e-5  # so small that the L0 of the first steps is that of the last
N_WARMUP = 2


def measure(
    shape_name: str, mode: str, n_steps: int, device: torch.device, is_compiled: bool
) -> dict[str, str | float]:
    """One row of the table: medians over `n_steps` steps of either kind, taken in turns."""
    shape = SHAPES[shape_name]
    torch.manual_seed(0)
    model = SAETransformer(build_model(shape, device), [shape.position], shape.ratio)
    tokens = torch.randint(shape.d_vocab, (n_steps, shape.batch_size, shape.n_ctx), device=device)
    make_sparse(model, shape.position, tokens[0])
    if is_compiled:
        compile_kernels(model)
    loss = LossConfig.model_validate(shape.loss(mode))
    reference = ReferenceStepper(
        model.tlens_model, model.saes.at(shape.position), shape.position, loss, LR
    )
    stepper = OurStepper(model, loss)
    extra_mb, reference_extra_mb = (
        peak_bytes(partial(take_two, step, tokens[0]), device) / 1e6
        for step in (stepper.step, reference.step)
    )
    ours, theirs = [], []
    for index in range(-N_WARMUP, n_steps):
        for step, seconds in ((stepper.step, ours), (reference.step, theirs)):
            duration = timed(step, tokens[index], device)
            if index >= 0:
                seconds.append(duration)
    stepper.measure_l0(tokens[-1])
    rate = matmul_rate(device)
    ours_s, theirs_s = statistics.median(ours), statistics.median(theirs)
    floor_s = step_flops(shape, stepper.plan, stepper.l0) / rate
    return {
        "shape": shape_name,
        "mode": mode,
        "tokens_per_s": shape.n_tokens / ours_s,
        "reference_tokens_per_s": shape.n_tokens / theirs_s,
        "speedup": theirs_s / ours_s,
        "extra_mb": extra_mb,
        "reference_extra_mb": reference_extra_mb,
        "floor_ratio": ours_s / floor_s,
        "l0": stepper.l0,
        "step_ms": 1e3 * ours_s,
        "reference_step_ms": 1e3 * theirs_s,
        "floor_ms": 1e3 * floor_s,
        "matmul_gflops": rate / 1e9,
        "n_steps": n_steps,
        **describe_machine(device),
    }


class OurStepper:
    """A step as the training script takes it."""

    def __init__(self, model: SAETransformer, loss: LossConfig) -> None:
        set_precision(model, None)
        self.model = model
        self.plan = derive_plan(model, loss)
        saes = {position: model.saes.at(position) for position in model.raw_sae_positions}
        config = TrainingConfig(
            n_samples=10**9, batch_size=1, lr=LR, lr_schedule="constant", max_grad_norm=10.0
        )
        self.trainer = SAETrainer(saes, self.forward, loss, config)
        self.l0 = float("nan")

    def forward(self, tokens: Tensor) -> Passes:
        """The passes of a batch."""
        return forward_passes(self.model, tokens, self.plan)

    def step(self, tokens: Tensor) -> Tensor:
        """One optimizer step; returns the loss."""
        loss = self.trainer.batch_loss(tokens)
        self.trainer.learn_from(loss, n_samples=1)
        return loss.total.detach()

    def measure_l0(self, tokens: Tensor) -> None:
        """Active elements per token, on average."""
        with torch.no_grad():
            (acts,) = self.forward(tokens).sae_acts.values()
        self.l0 = (acts.c != 0).sum(dim=-1).float().mean().item()


def build_model(shape: Shape, device: torch.device) -> TLensModel:
    """A model with random weights, and layer norms without any, as after folding."""
    settings = shape.tlens_settings()
    if not TLENS_HAS_HOOKED_TRANSFORMER:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge

        config = TransformerBridgeConfig(
            **settings, normalization_type="LN", architecture="TransformerLensNative"
        )
        return TransformerBridge.boot_native(config).to(device)
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(**settings, normalization_type="LNPre", device=str(device))
    return HookedTransformer(config)


@torch.no_grad()
def make_sparse(model: SAETransformer, position: str, tokens: Tensor) -> None:
    """Lower the encoder's bias until `TARGET_L0` elements are active on an average token.

    The decoder becomes the encoder's transpose, as in a trained SAE, roughly.
    """
    sae: Any = model.saes.at(position)  # a ReLU SAE
    _, acts = model.forward_raw(tokens, run_entire_model=False)
    pre_acts = sae.encoder[0](acts[position].flatten(end_dim=-2))
    share = TARGET_L0 / sae.n_dict
    threshold = pre_acts.flatten().kthvalue(int((1 - share) * pre_acts.numel())).values
    sae.encoder[0].bias -= threshold
    sae.decoder.weight.copy_(sae.encoder[0].weight.T)


def take_two(step: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    """Take two steps, so that gradients and the optimizer's state are there in the second."""
    step(tokens)
    step(tokens)


def timed(step: Callable[[Tensor], Tensor], tokens: Tensor, device: torch.device) -> float:
    """Seconds that a step takes."""
    synchronize(device)
    begin = time.perf_counter()
    step(tokens)
    synchronize(device)
    return time.perf_counter() - begin


def describe_machine(device: torch.device) -> dict[str, str | float]:
    """Describe the machine and the versions that the numbers depend on."""
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.machine(),
        "n_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformer_lens": version("transformer-lens"),
    }
