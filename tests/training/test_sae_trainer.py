"""Optimizer steps of several batches, of whose tokens some are left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.runs.weight_files import load_state, save_state, state_path
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.config import (
    GatedSAEConfig,
    JumpReLUSAEConfig,
    ReLUSAEConfig,
    SAEConfig,
    TopKSAEConfig,
)
from sparsify.training.config import DeadElementsConfig, TrainingConfig
from sparsify.training.forward_passes import forward_passes
from sparsify.training.forward_plan import derive_plan
from sparsify.training.sae_trainer import SAETrainer

pytestmark = pytest.mark.model

BOS = 7
TWO = ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"]
LATER = {"total_coeff": 0.9, "hook_positions": "blocks.2.hook_resid_mid"}
RELU = ReLUSAEConfig(dict_size_to_input_ratio=3)
JUMPRELU = JumpReLUSAEConfig(dict_size_to_input_ratio=3, bandwidth=0.1, initial_threshold=0.1)
TERMS: dict[str, tuple[SAEConfig, dict[str, Any]]] = {
    "sparsity": (RELU, {"sparsity": {"coeff": 0.3}}),
    "sparsity, 0.5-norm": (RELU, {"sparsity": {"coeff": 0.3, "p_norm": 0.5}}),
    "sparsity, tanh": (RELU, {"sparsity": {"coeff": 0.3, "penalty": "tanh"}}),
    "sparsity, l0": (JUMPRELU, {"sparsity": {"coeff": 0.3, "penalty": "l0"}}),
    "out_to_in": (TopKSAEConfig(dict_size_to_input_ratio=3, k=4), {"out_to_in": {"coeff": 0.5}}),
    "out_to_orig": (RELU, {"out_to_orig": {"coeff": 0.7}}),
    "in_to_orig": (RELU, {"in_to_orig": LATER}),
    "logits_kl": (RELU, {"logits_kl": {"coeff": 1.1}}),
    "next_token_ce": (RELU, {"next_token_ce": {"coeff": 1.3}}),
    "pre_act": (JUMPRELU, {"pre_act": {"coeff": 1.0}}),
    "all": (
        GatedSAEConfig(dict_size_to_input_ratio=3),  # whose other outputs count, too
        {
            "sparsity": {"coeff": 0.3},
            "out_to_in": {"coeff": 0.5},
            "in_to_orig": LATER,
            "logits_kl": {"coeff": 1.1},
            "next_token_ce": {"coeff": 1.3},
        },
    ),
}


@pytest.fixture
def tokens() -> Tensor:
    """Four sequences that keep 7, 2, 0 and 4 tokens, in 5, 0, 0 and 3 of which one is predicted."""
    tokens = torch.randint(8, 64, (4, 8))
    tokens[0, 2] = tokens[1, 1::2] = tokens[1, [2, 4]] = tokens[2] = tokens[3, 4:] = BOS
    return tokens


class Recorded:
    """A trainer of a model's SAEs, and the gradients of its steps."""

    def __init__(
        self, tlens_model: Any, sae: SAEConfig, mix: dict[str, Any], *, batch_size: int
    ) -> None:
        torch.manual_seed(1)
        self.model = SAETransformer(tlens_model, TWO, sae=sae)
        losses = LossConfig.model_validate(mix)
        self.plan = derive_plan(self.model, losses)
        config = TrainingConfig(
            n_samples=64, batch_size=batch_size, effective_batch_size=4, lr=1e-3
        )
        # The first term of a step finds all elements dead.
        dead = DeadElementsConfig(after_n_tokens=1) if "pre_act" in mix else None
        self.trainer = SAETrainer(
            {position: self.model.saes.at(position) for position in TWO},
            self.forward,
            losses,
            config,
            dead_elements=dead,
        )
        if self.trainer.dead is not None:
            for n_since in self.trainer.dead.n_since.values():
                n_since.fill_(10**6)
            self.trainer.dead.update = lambda passes: None  # or batches would see other dead ones
        self.steps: list[list[Tensor]] = []
        self.trainer.stepper.before_step = self.record

    def forward(self, tokens: Tensor) -> Passes:
        return forward_passes(self.model, tokens, self.plan).only(tokens != BOS)

    def record(self, grad_norm: Tensor) -> None:
        parameters = self.trainer.stepper.parameters
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.steps.append([grad.to_dense().clone() for grad in grads])

    def learn(self, batches: tuple[Tensor, ...]) -> None:
        for batch in batches:
            self.trainer.learn_from(self.trainer.batch_loss(batch), len(batch))


@pytest.mark.parametrize("name", TERMS)
def test_a_step_is_about_all_its_kept_tokens_however_they_come(
    tiny_model: Any, tokens: Tensor, name: str
):
    sae, mix = TERMS[name]
    whole = Recorded(tiny_model, sae, mix, batch_size=4)
    whole.learn((tokens,))
    for batch_size in (1, 2):
        parts = Recorded(tiny_model, sae, mix, batch_size=batch_size)
        parts.learn(tokens.split(batch_size))
        (found,), (expected,) = parts.steps, whole.steps
        largest = max(grad.abs().max().item() for grad in expected)
        assert largest > 0
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(1.0, largest))


def test_a_step_resumed_between_batches_of_different_counts_ends_alike(
    tiny_model: Any, tokens: Tensor, tmp_path: Path
):
    sae, mix = TERMS["all"]
    whole, parts = (Recorded(tiny_model, sae, mix, batch_size=1) for _ in range(2))
    rows = (*tokens.split(1), *tokens.flip(0).split(1))
    whole.learn(rows)
    parts.learn(rows[:6])
    state = {
        "stepper": parts.trainer.stepper.state_dict(),
        "weights": parts.model.saes.state_dict(),
    }
    save_state(tmp_path, 6, state)
    resumed = Recorded(tiny_model, sae, mix, batch_size=1)
    state = load_state(state_path(tmp_path, 6))
    resumed.model.saes.load_state_dict(state["weights"])
    resumed.trainer.stepper.load_state_dict(state["stepper"])
    resumed.learn(rows[6:])
    for found, expected in zip(resumed.steps[0], whole.steps[1], strict=True):
        assert torch.equal(found, expected)


def test_steps_without_a_kept_token_move_nothing(tiny_model: Any):
    recorded = Recorded(tiny_model, *TERMS["all"], batch_size=2)
    before = {name: value.clone() for name, value in recorded.model.saes.state_dict().items()}
    ignored = torch.full((2, 8), BOS)
    loss = recorded.trainer.batch_loss(ignored)
    assert (loss.total.item(), loss.terms) == (0.0, {})
    recorded.learn((ignored, ignored))
    assert recorded.trainer.stepper.n_steps == 1
    # Only the elements' norms are restored, which rounds.
    torch.testing.assert_close(recorded.model.saes.state_dict(), before)
    metrics = recorded.trainer.metrics(loss)
    assert metrics["loss"] == 0
    assert not any(name.startswith(("loss/", "sparsity/")) for name in metrics)
