"""Loss terms against two whole passes, and how often each part of the model runs."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify.kernels.unembedding import Unembedding
from sparsify.losses.loss import LossConfig
from sparsify.losses.total import total_loss
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.acts import SAEActs
from sparsify.settings.base_config import UserError
from sparsify.training.forward_passes import forward_passes
from sparsify.training.forward_plan import derive_plan

pytestmark = pytest.mark.model

RESID, MLP = ["blocks.1.hook_resid_pre"], ["blocks.1.hook_mlp_out"]
THREE = ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre"]

SPARSITY = {"sparsity": {"p_norm": 1.0, "coeff": 0.3}}
LOCAL = {**SPARSITY, "out_to_in": {"coeff": 1.0}}
E2E = {**SPARSITY, "logits_kl": {"coeff": 2.0}}
OUT_TO_ORIG = {**SPARSITY, "out_to_orig": {"coeff": 1.5}}


def downstream(*positions: str) -> dict[str, Any]:
    return {"in_to_orig": {"hook_positions": list(positions), "total_coeff": 0.7}}


END = downstream("blocks.2.hook_resid_mid", "blocks.2.hook_resid_post")
MIXES = {
    "local": LOCAL,
    "e2e": E2E,
    "e2e and downstream": {**E2E, **END},
    "e2e and out_to_orig": {**E2E, **OUT_TO_ORIG},
    "out_to_orig": OUT_TO_ORIG,
    "downstream": {**SPARSITY, **downstream("blocks.2.hook_resid_mid")},
    "at a later SAE": {**LOCAL, **downstream("blocks.2.hook_resid_pre")},
}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (2, 6))


def build(tlens_model: Any, positions: list[str]) -> SAETransformer:
    # Predictions far from uniform, so that KL is no rounding error.
    with torch.no_grad():
        for name, parameter in tlens_model.named_parameters():
            if parameter.dim() > 1 and "embed" in name:
                parameter.mul_(4)
    return SAETransformer(tlens_model, positions, dict_size_to_input_ratio=3.0)


def two_whole_runs(
    model: SAETransformer, tokens: Tensor, losses: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss as the paper defines it, from both complete models."""
    others = losses.in_to_orig.hook_positions if losses.in_to_orig else []
    orig_logits, orig_acts = model.forward_raw(tokens, cache_positions=others)
    no_sae = [position for position in others if position not in model.raw_sae_positions]
    new_logits, new_acts = model(tokens, cache_positions=no_sae)
    if not (losses.logits_kl or losses.in_to_orig or losses.out_to_orig):
        _, new_acts = model(None, orig_acts=orig_acts)
    values: dict[str, Tensor] = {}
    total = torch.zeros(())
    for position in model.raw_sae_positions:
        acts = new_acts[position]
        if losses.sparsity:
            norms = acts.c.abs().sum(dim=-1)
            values[f"sparsity/{position}"] = norms.mean() / acts.input.shape[-1]
            total = total + losses.sparsity.coeff * values[f"sparsity/{position}"]
        if losses.out_to_in:
            values[f"out_to_in/{position}"] = (acts.output - acts.input).square().mean()
            total = total + losses.out_to_in.coeff * values[f"out_to_in/{position}"]
        if losses.out_to_orig:
            error = acts.output - orig_acts[position].flatten(start_dim=2)
            values[f"out_to_orig/{position}"] = error.square().mean()
            total = total + losses.out_to_orig.coeff * values[f"out_to_orig/{position}"]
    if losses.in_to_orig:
        for position in others:
            error = new_acts[position].input - orig_acts[position]
            values[f"in_to_orig/{position}"] = error.square().mean()
            share = losses.in_to_orig.total_coeff / len(others)
            total = total + share * values[f"in_to_orig/{position}"]
    if losses.logits_kl:
        assert orig_logits is not None
        assert new_logits is not None
        log_orig, log_new = orig_logits.log_softmax(dim=-1), new_logits.log_softmax(dim=-1)
        kl = F.kl_div(log_new, log_orig, log_target=True, reduction="none").sum(dim=-1).mean()
        values["logits_kl"] = kl
        total = total + losses.logits_kl.coeff * kl
    return total, values


def gradients(model: SAETransformer) -> dict[str, Tensor]:
    grads = {
        name: p.grad.clone() for name, p in model.saes.named_parameters() if p.grad is not None
    }
    model.saes.zero_grad()
    return grads


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_bridge"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("positions", [RESID, MLP, THREE], ids=["resid", "mlp", "three"])
def test_plan_gives_the_loss_and_gradients_of_two_whole_runs(
    kind: str, mix: str, positions: list[str], tokens: Tensor, request: pytest.FixtureRequest
):
    model = build(request.getfixturevalue(kind), positions)
    losses = LossConfig.model_validate(MIXES[mix])
    plan = derive_plan(model, losses)
    expected, expected_values = two_whole_runs(model, tokens, losses)
    expected.backward()
    expected_grads = gradients(model)

    passes = forward_passes(model, tokens, plan)
    loss, values = total_loss(losses, passes)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert values.keys() == expected_values.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, expected_values[name].detach(), rtol=1e-5, atol=1e-7)
        assert value > 1e-4, f"{name} is too small to compare"
    grads = gradients(model)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        largest = expected_grads[name].abs().max().item()
        assert largest > 0
        torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=1e-5 * largest)
    assert all(p.grad is None for p in model.tlens_model.parameters())


# How often the three blocks run.
COUNTS = [
    # Nothing behind the SAE: block 0 makes what it reads.
    (RESID, LOCAL, [1, 0, 0]),
    # The spliced pass ends where it begins.
    (RESID, OUT_TO_ORIG, [1, 0, 0]),
    # Block 0 is shared, the others run raw and spliced.
    (RESID, E2E, [1, 2, 2]),
    (RESID, {**E2E, **END}, [1, 2, 2]),
    # Both runs stop at the hook point: before block 2, inside block 1, inside block 2.
    (RESID, {**LOCAL, **downstream("blocks.2.hook_resid_pre")}, [1, 2, 0]),
    (RESID, {**LOCAL, **downstream("blocks.1.hook_mlp_out")}, [1, 2, 0]),
    (RESID, {**LOCAL, **downstream("blocks.2.attn.hook_z")}, [1, 2, 2]),
    # An SAE inside block 1: the block has to run for it, once, or raw and spliced.
    (MLP, LOCAL, [1, 1, 0]),
    (MLP, OUT_TO_ORIG, [1, 2, 0]),
    (MLP, E2E, [1, 2, 2]),
    (MLP, {**LOCAL, **downstream("blocks.1.hook_resid_post")}, [1, 2, 0]),
    # At the ends of the model: nothing, or everything, is shared.
    (["hook_embed"], LOCAL, [0, 0, 0]),
    (["hook_embed"], E2E, [2, 2, 2]),
    (["blocks.0.hook_resid_pre"], LOCAL, [0, 0, 0]),
    (["blocks.0.hook_resid_pre"], E2E, [2, 2, 2]),
    (["blocks.0.hook_resid_post"], LOCAL, [1, 0, 0]),
    (["blocks.2.hook_resid_post"], LOCAL, [1, 1, 1]),
    (["blocks.2.hook_resid_post"], E2E, [1, 1, 1]),
    # Three: from the first (block 1) to the last (before block 2).
    (THREE, LOCAL, [1, 1, 0]),
    (THREE, OUT_TO_ORIG, [1, 2, 0]),
    (THREE, E2E, [1, 2, 2]),
    (THREE, {**LOCAL, **downstream("blocks.2.hook_resid_pre")}, [1, 2, 0]),
    (THREE, {**LOCAL, **downstream("blocks.2.hook_resid_mid")}, [1, 2, 2]),
]


@contextmanager
def counted(model: Any) -> Iterator[tuple[list[int], list[str]]]:
    """Calls of each block's parts, and the names of what is called behind the blocks."""
    blocks, ends = [0] * len(model.blocks), []
    handles = []
    for index, block in enumerate(model.blocks):

        def count(*_: object, index: int = index) -> None:
            blocks[index] += 1

        handles.append(block.attn.register_forward_hook(count))
    for name in ("ln_final", "unembed"):
        module = getattr(model, name)
        handles.append(module.register_forward_hook(lambda *_, name=name: ends.append(name)))
    products = Unembedding.products

    def count_logits(*args: Any) -> Tensor:
        ends.append("logits")
        return products(*args)

    with patch.object(Unembedding, "products", count_logits):
        yield blocks, ends
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_bridge"])
@pytest.mark.parametrize(("positions", "mix", "counts"), COUNTS)
def test_nothing_runs_that_no_term_needs(
    kind: str,
    positions: list[str],
    mix: dict[str, Any],
    counts: list[int],
    tokens: Tensor,
    request: pytest.FixtureRequest,
):
    model = SAETransformer(request.getfixturevalue(kind), positions, dict_size_to_input_ratio=2.0)
    losses = LossConfig.model_validate(mix)
    plan = derive_plan(model, losses)
    with counted(model.tlens_model) as (blocks, ends):
        passes = forward_passes(model, tokens, plan)
        assert blocks == counts
        assert ends == []
        loss, _ = total_loss(losses, passes)
        loss.backward()
        assert blocks == counts
        assert bool(ends) == (losses.logits_kl is not None)


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_bridge"])
def test_gradients_flow_through_the_suffix_alone(
    kind: str, tokens: Tensor, request: pytest.FixtureRequest
):
    model = SAETransformer(request.getfixturevalue(kind), RESID, dict_size_to_input_ratio=2.0)
    plan = derive_plan(model, LossConfig.model_validate(E2E))
    passes = forward_passes(model, tokens, plan)
    assert passes.orig_resid is not None
    assert passes.new_resid is not None
    assert not passes.orig_resid.requires_grad
    assert passes.new_resid.requires_grad
    assert not any(act.requires_grad for act in passes.orig_acts.values())
    acts = passes.new_acts[RESID[0]]
    assert isinstance(acts, SAEActs)
    assert not acts.input.requires_grad


# Refusals


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_bridge"])
@pytest.mark.parametrize(
    ("positions", "hook_position", "message"),
    [
        (RESID, "blocks.0.hook_mlp_out", "does not lie behind the first SAE, at 'blocks.1.hook_re"),
        (RESID, "blocks.0.hook_resid_post", "does not lie behind the first SAE"),
        (RESID, RESID[0], "does not lie behind the first SAE"),
        (MLP, "blocks.1.hook_resid_mid", "at 'blocks.1.hook_mlp_out', so both passes agree there"),
        (THREE, RESID[0], "does not lie behind the first SAE"),
        (RESID, "blocks.2.hook_resid_pots", "did you mean 'blocks.2.hook_resid_post'?"),
        (RESID, "hook_resid_post", "the model has no hook point 'hook_resid_post'"),
        (RESID, "blocks.2.attn.hook_pattern", "has shape (1, 2, 3, 3)"),
        (RESID, "ln_final.hook_normalized", "lies behind the last block"),
    ],
)
def test_positions_at_which_nothing_can_be_compared_are_rejected(
    kind: str,
    positions: list[str],
    hook_position: str,
    message: str,
    request: pytest.FixtureRequest,
):
    model = SAETransformer(request.getfixturevalue(kind), positions, dict_size_to_input_ratio=2.0)
    losses = LossConfig.model_validate(
        {**LOCAL, **downstream("blocks.2.hook_mlp_out", hook_position)}
    )
    with pytest.raises(UserError, match=re.escape(message)) as error:
        derive_plan(model, losses)
    assert str(error.value).startswith("loss.in_to_orig.hook_positions: ")


def test_positions_of_later_saes_can_be_compared(tiny_model: Any):
    model = SAETransformer(tiny_model, THREE, dict_size_to_input_ratio=2.0)
    losses = LossConfig.model_validate({**LOCAL, **downstream(*THREE[1:])})
    plan = derive_plan(model, losses)
    assert plan.raw_positions == tuple(THREE[1:])
    assert plan.spliced_positions == ()  # the SAEs keep what they read
    assert not plan.is_local
