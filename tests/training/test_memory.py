from typing import Any

import pytest
import torch

from sparsify.losses.loss import LossConfig
from sparsify.sae_transformer import SAETransformer
from sparsify.scripts.benchmark.measure import OurStepper, build_model, peak_bytes
from sparsify.scripts.benchmark.shapes import MODES, Shape
from sparsify.settings.base_config import UserError
from sparsify.training import memory
from sparsify.training.forward_plan import ForwardPlan, derive_plan
from sparsify.training.memory import (
    check_memory,
    estimate_memory,
    explained_out_of_memory,
    format_estimate,
    free_memory,
)

CPU = torch.device("cpu")
SHAPE = Shape(4, 64, 2, 512, batch_size=8, n_ctx=64, block=1, ratio=16.0)


def plan_of(model: SAETransformer, mode: str) -> ForwardPlan:
    loss = LossConfig.model_validate(SHAPE.loss(mode))
    return derive_plan(model, loss)


@pytest.mark.model
def test_terms_by_hand(tiny_model: Any):
    model = SAETransformer(tiny_model, "blocks.1.hook_resid_pre", 2.0)
    loss = LossConfig.model_validate({"sparsity": {"coeff": 1.0}, "logits_kl": {"coeff": 1.0}})
    plan = derive_plan(model, loss)
    terms = estimate_memory(model, plan, n_tokens=10)
    weights = 16 * 32 + 32 + 32 * 16 + 16  # encoder and decoder of 32 elements
    assert terms["SAEs"] == terms["gradients"] == 4 * weights
    assert terms["Adam's state"] == 2 * 4 * weights
    assert terms["SAE activations"] == 4 * 10 * (2 * 16 + 3 * 32)
    # Two blocks behind the SAE, with an MLP of 32, and both final residual streams.
    assert terms["block activations"] == 4 * 10 * (2 * (6 * 16 + 32) + 2 * 16)
    # Logits of both passes, and as many probabilities, as all tokens are one tile.
    assert terms["logits"] == 2 * 4 * (10 + 10) * 64
    assert list(terms.values()) == sorted(terms.values(), reverse=True)


@pytest.mark.model
@pytest.mark.parametrize("mode", MODES)
def test_estimate_is_near_what_a_step_takes(mode: str):
    model = SAETransformer(build_model(SHAPE, CPU), SHAPE.position, SHAPE.ratio)
    terms = estimate_memory(model, plan_of(model, mode), SHAPE.n_tokens)
    stepper = OurStepper(model, LossConfig.model_validate(SHAPE.loss(mode)))
    measured = peak_bytes(stepper.step, torch.randint(512, (8, 64)), CPU)
    estimated = sum(terms.values()) - terms["model"] - terms["SAEs"]
    assert measured / 1.5 < estimated < measured * 1.5


def test_estimate_is_one_line():
    line = format_estimate({"logits": 2_500_000_000, "model": 4_200_000})
    assert line == "memory of a step, estimated: 2,504 MB (logits 2,500, model 4)"


def test_out_of_memory_names_the_largest_term_that_a_setting_shrinks():
    terms = {"model": 9_000_000, "SAE activations": 5_000_000, "logits": 1_000_000}
    message = r"^device: out of memory \(CUDA out of memory\)\. The memory of a step.*Lower batch_s"
    with pytest.raises(UserError, match=message), explained_out_of_memory(terms):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")


def test_out_of_memory_on_a_cpu_is_explained_and_no_other_error():
    terms = {"SAE activations": 5_000_000}
    message = r"^device: out of memory \(can't allocate memory: you tried to allocate \d+ bytes\)"
    with pytest.raises(UserError, match=message), explained_out_of_memory(terms):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="a bug"), explained_out_of_memory(terms):
        raise RuntimeError("a bug")


def test_a_step_must_fit_besides_what_is_there(monkeypatch: pytest.MonkeyPatch):
    terms = {"model": 9_000_000, "SAE activations": 5_000_000, "logits": 1_000_000}
    monkeypatch.setattr(memory, "free_memory", lambda _: 6_000_000)
    fact = check_memory(terms, "cpu", ("model",), "batch_size")
    assert fact == (
        "15 MB (model 9, SAE activations 5, logits 1) in a step; 6 MB free besides model"
    )
    monkeypatch.setattr(memory, "free_memory", lambda _: 4_000_000)
    message = (
        r"^device: a step takes 6 MB besides model, but cpu has 4 MB free\. The .*Lower batch_s"
    )
    with pytest.raises(UserError, match=message):
        check_memory(terms, "cpu", ("model",), "batch_size")
    monkeypatch.setattr(memory, "free_memory", lambda _: None)
    assert "unknown free besides model" in check_memory(terms, "cpu", ("model",), "batch_size")


def test_this_machine_says_what_is_free():
    free = free_memory("cpu")
    assert free is None or free > 1_000_000
