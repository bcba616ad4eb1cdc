"""Mixed precision, and that a GPU would not have to wait for the host, both on the CPU."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.kernels import chunked
from sparsify.losses.loss import LossConfig
from sparsify.sae_transformer import SAETransformer
from sparsify.scripts.benchmark.measure import OurStepper, build_model
from sparsify.scripts.benchmark.shapes import MODES, Shape
from sparsify.tlens.hooked_model import HookedModel
from sparsify.training.forward_passes import forward_passes
from sparsify.training.precision import set_precision

pytestmark = pytest.mark.model

SHAPE = Shape(3, 16, 2, 64, batch_size=4, n_ctx=8, block=1, ratio=8.0)


def build(mode: str) -> OurStepper:
    torch.manual_seed(0)
    model = SAETransformer(build_model(SHAPE, torch.device("cpu")), SHAPE.position, SHAPE.ratio)
    return OurStepper(model, LossConfig.model_validate(SHAPE.loss(mode)))


def some_tokens() -> Tensor:
    return torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(0))


def test_only_the_frozen_model_multiplies_in_bfloat16():
    stepper = build("e2e")
    model = stepper.model
    assert set_precision(model, True)
    seen: dict[str, torch.dtype] = {}
    names = ["blocks.2.hook_resid_pre", "blocks.2.mlp.hook_pre", "blocks.2.attn.hook_q"]

    def note(name: str) -> Any:
        return lambda act: seen.update({name: act.dtype})

    tokens = some_tokens()
    model.hooked_model.run(
        model.hooked_model.prefix(tokens, 1), {name: note(name) for name in names}, 3
    )
    assert [seen[name] for name in names] == [torch.float32, torch.bfloat16, torch.bfloat16]
    (acts,) = forward_passes(model, tokens, stepper.plan).sae_acts.values()
    assert {acts.input.dtype, acts.c.dtype, acts.output.dtype} == {torch.float32}
    assert stepper.step(tokens).dtype == torch.float32
    state = stepper.trainer.stepper.state_dict()["optimizers"][0]["state"]
    kept = [tensor for moments in state.values() for tensor in moments.values()]
    assert {tensor.dtype for tensor in [*kept, *model.saes.parameters()]} == {torch.float32}


@pytest.mark.parametrize("mode", MODES)
def test_mixed_precision_trains_nearly_the_same(mode: str):
    losses = []
    for mixed in (False, True):
        stepper = build(mode)
        set_precision(stepper.model, mixed)
        losses.append(torch.stack([stepper.step(some_tokens()) for _ in range(3)]))
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-3)


def test_a_cpu_multiplies_in_the_precision_of_the_weights_if_nothing_is_said():
    model = build("e2e").model
    set_precision(model, True)
    assert not set_precision(model, None)
    assert model.hooked_model.product_dtype is None


class Waits(TorchDispatchMode):
    """Notes operations for which the host would wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in self.NAMES:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_no_step_waits_for_the_device(mode: str, monkeypatch: pytest.MonkeyPatch):
    stepper = build(mode)
    # On a CPU, and there alone, it looks at the bias.
    monkeypatch.setattr(HookedModel, "unembed", stepper.model.hooked_model.unembed)
    # There alone it also checks that every gradient is finite.
    stepper.trainer.stepper.before_step = None
    # And whether a KL is finite.
    monkeypatch.setattr(chunked, "can_look", lambda value: False)
    stepper.step(some_tokens())
    with Waits() as waits:
        stepper.step(some_tokens())
    assert waits.seen == []
    with Waits() as waits:
        stepper.step(some_tokens()).item()
    assert waits.seen == ["aten._local_scalar_dense.default"]
