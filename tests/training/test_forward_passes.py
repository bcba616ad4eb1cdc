"""Training steps of SAEs with other outputs, and of transcoders, against plain runs."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import mean, pvariance
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.losses.total import total_loss
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.base import SAE
from sparsify.saes.config import (
    GatedSAEConfig,
    MatryoshkaSAEConfig,
    SAEConfig,
    TopKSAEConfig,
    TranscoderConfig,
)
from sparsify.saes.gated import GatedSAE
from sparsify.saes.linear import LinearSAE
from sparsify.saes.matryoshka import MatryoshkaSAE
from sparsify.saes.topk import TopKSAE
from sparsify.settings.base_config import UserError
from sparsify.training.forward_passes import drawn_outputs, forward_passes
from sparsify.training.forward_plan import derive_plan

pytestmark = pytest.mark.model

RESID = ["blocks.1.hook_resid_pre"]
THREE = ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre"]
LATER = "blocks.2.hook_resid_post"
SHARES = [0.1, 0.25, 0.5]
CONFIGS: dict[str, SAEConfig] = {
    "gated": GatedSAEConfig(dict_size_to_input_ratio=3),
    "multi_topk": TopKSAEConfig(dict_size_to_input_ratio=3, k=3, multi_k=8),
    "matryoshka": MatryoshkaSAEConfig(dict_size_to_input_ratio=3, k=4, prefix_shares=SHARES),
}
WEIGHTS = {"gated": [1.0], "multi_topk": [1 / 8], "matryoshka": [1.0, 1.0, 1.0]}
LOCAL = {"sparsity": {"coeff": 0.3}, "out_to_in": {"coeff": 2.0}}
E2E = {
    "sparsity": {"coeff": 0.3},
    "logits_kl": {"coeff": 2.0},
    "in_to_orig": {"total_coeff": 0.7, "hook_positions": LATER},
    "next_token_ce": {"coeff": 0.2},
}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (2, 6))


def build(tlens_model: Any, sae: SAEConfig, positions: list[str], **reads: Any) -> SAETransformer:
    """Predictions far from uniform, and SAEs that are not as they start."""
    with torch.no_grad():
        for name, parameter in tlens_model.named_parameters():
            if parameter.dim() > 1 and "embed" in name:
                parameter.mul_(4)
    model = SAETransformer(tlens_model, positions, sae=sae, **reads)
    with torch.no_grad():
        for parameter in model.saes.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for position in model.raw_sae_positions:
        model.saes.at(position).restore_constraints()
    return model


def run(model: SAETransformer, tokens: Tensor, mix: dict[str, Any]) -> tuple[LossConfig, Passes]:
    losses = LossConfig.model_validate(mix)
    plan = derive_plan(model, losses)
    return losses, forward_passes(model, tokens, plan)


def gradients(total: Tensor, module: nn.Module) -> dict[str, Tensor]:
    module.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        grad = grad.to_dense()
        largest = grad.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(actual[name].to_dense(), grad, rtol=0, atol=1e-5 * largest)


def plain_other(sae: SAE, input: Tensor, index: int) -> Tensor:
    """The other output as the papers have it."""
    assert isinstance(sae, LinearSAE)
    pre_acts = (input - sae.decoder.bias) @ sae.affine.weight.T + sae.affine.bias
    elements, bias = sae.decoder.elements, sae.decoder.bias
    if isinstance(sae, GatedSAE):
        return pre_acts.relu() @ elements.detach() + bias.detach()
    if isinstance(sae, TopKSAE):
        assert sae.multi_k is not None
        smallest = pre_acts.topk(sae.multi_k, dim=-1).values[..., -1:]
        return (pre_acts.relu() * (pre_acts >= smallest)) @ elements + bias
    assert isinstance(sae, MatryoshkaSAE)
    size = sae.prefix_sizes[index]
    return sae.encode(input)[..., :size] @ elements[:size] + bias


def plain_e2e(
    model: SAETransformer, tokens: Tensor, write: Callable[[SAE, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The weighted errors of one spliced pass, from full logits, and the sparsity in it."""
    kept: dict[str, Tensor] = {}
    sparsity: list[Tensor] = []

    def keep(act: Tensor, hook: Any) -> None:
        kept[hook.name] = act.flatten(start_dim=2)

    def splice(act: Tensor, hook: Any, position: str, point: str) -> Tensor:
        sae = model.saes.at(position)
        sparsity.append(sae(kept[point]).penalised.sum(dim=-1).mean() / sae.d_act)
        return write(sae, kept[point]).reshape(act.shape)

    hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
    for position, source in model.reads.items():
        point = model.tlens_model.hook_dict[source].name
        hooks += [(source, keep), (position, partial(splice, position=position, point=point))]
    later = model.tlens_model.hook_dict[LATER].name
    run_with_hooks = model.tlens_model.run_with_hooks
    orig = run_with_hooks(tokens, fwd_hooks=[(LATER, keep)])
    log_orig, raw_later = orig.log_softmax(dim=-1).detach(), kept[later].detach()
    new = run_with_hooks(tokens, fwd_hooks=[*hooks, (LATER, keep)])
    kl = (log_orig.exp() * (log_orig - new.log_softmax(dim=-1))).sum(dim=-1).mean()
    ce = F.cross_entropy(new[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    in_to_orig = (kept[later] - raw_later).square().mean()
    return 2.0 * kl + 0.2 * ce + 0.7 * in_to_orig, torch.stack(sparsity).sum()


def plain_drawn(sae: SAE, input: Tensor, drawn: Sequence[int]) -> Tensor:
    """The other outputs, of each sequence the one that is drawn for it."""
    outputs = {index: plain_other(sae, input, index) for index in set(drawn)}
    return torch.stack([outputs[index][row] for row, index in enumerate(drawn)])


def assert_is_main_plus_drawn(model: SAETransformer, tokens: Tensor, kind: str) -> None:
    """Compare a step with two plain passes, of which it drew the outputs of the second."""
    losses, passes = run(model, tokens, E2E)
    total, _ = total_loss(losses, passes)
    actual = gradients(total, model.saes)
    ((weight, _),) = passes.others
    assert weight == sum(WEIGHTS[kind])
    n_fitting = 0
    for drawn in product(range(len(WEIGHTS[kind])), repeat=len(tokens)):
        errors, sparsity = plain_e2e(model, tokens, lambda sae, act: sae(act).output)
        others, _ = plain_e2e(model, tokens, partial(plain_drawn, drawn=drawn))
        expected = errors + 0.3 * sparsity + weight * others
        if total.item() == pytest.approx(expected.item(), rel=1e-5):
            n_fitting += 1
            assert_same_gradients(actual, gradients(expected, model.saes))
    assert n_fitting == 1


@pytest.mark.parametrize("positions", [RESID, THREE], ids=["one", "three"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_e2e_step_is_the_run_and_one_with_a_drawn_other_output(
    tiny_model: Any, tokens: Tensor, kind: str, positions: list[str]
):
    assert_is_main_plus_drawn(build(tiny_model, CONFIGS[kind], positions), tokens, kind)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_frozen_sae_writes_what_it_does_in_use(tiny_model: Any, tokens: Tensor, kind: str):
    model = build(tiny_model, CONFIGS[kind], THREE)
    first, frozen, last = (model.saes.at(position) for position in model.raw_sae_positions)
    frozen.requires_grad_(False)
    _, passes = run(model, tokens, E2E)
    ((_, other),) = passes.others
    for sae, acts in zip((first, frozen, last), other.sae_acts.values(), strict=True):
        is_own = torch.allclose(acts.output, sae.decode(acts.c), atol=1e-5)
        assert is_own == (sae is frozen)


@pytest.mark.parametrize("kind", ["multi_topk", "matryoshka"])
def test_other_outputs_train_what_has_row_sparse_gradients(
    tiny_model: Any, tokens: Tensor, kind: str, monkeypatch: pytest.MonkeyPatch
):
    model = build(tiny_model, CONFIGS[kind], THREE)
    monkeypatch.setattr("sparsify.kernels.sparse.MIN_DENSE_SIZE", 0)
    monkeypatch.setattr("sparsify.kernels.sparse.MAX_ACTIVE_SHARE", 0.5)
    for position in THREE:
        model.saes.at(position).row_sparse_grads = True
    # Of three tokens, so that few elements are active.
    assert_is_main_plus_drawn(model, tokens[:1, :3], kind)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        # Places 0, 1/4, 1/2 and 3/4; the thirds end at 1/3 and 2/3.
        (0.0, [(0, slice(0, 2)), (1, slice(2, 3)), (2, slice(3, 4))]),
        # 0.9, 0.15, 0.4 and 0.65.
        (0.9, [(2, slice(0, 1)), (0, slice(1, 2)), (1, slice(2, 4))]),
    ],
)
def test_outputs_are_drawn_around_a_circle(start: float, expected: list[tuple[int, slice]]):
    assert drawn_outputs([1.0, 1.0, 1.0], 4, start) == expected


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [0.5, 3.0, 1.5]])
def test_each_sequence_gets_each_output_by_its_weight(weights: list[float]):
    n_starts = 400
    counts = [Counter[int]() for _ in range(5)]
    for number in range(n_starts):
        for index, rows in drawn_outputs(weights, 5, (number + 0.5) / n_starts):
            for count in counts[rows]:
                count[index] += 1
    for count in counts:
        shares = [count[index] / n_starts for index in range(len(weights))]
        assert shares == pytest.approx([weight / sum(weights) for weight in weights], abs=0.01)


def test_draws_are_unbiased_and_vary_less_than_one_for_all(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
):
    model = build(tiny_model, CONFIGS["matryoshka"], RESID).double()
    mix = {"in_to_orig": E2E["in_to_orig"]}

    def value(tokens: Tensor, drawn: list[tuple[int, slice]]) -> float:
        monkeypatch.setattr(f"{forward_passes.__module__}.drawn_outputs", lambda *_: drawn)
        losses, passes = run(model, tokens, mix)
        return total_loss(losses, passes)[0].item()

    # Sequences at steps of 1/6 on thirds: the draw changes every 1/6.
    draws = [drawn_outputs([1.0, 1.0, 1.0], 6, (part + 0.5) / 6) for part in range(6)]
    variances = []
    for tokens in torch.randint(64, (5, 6, 6)):
        # Each is the main error and three times that of one prefix.
        one_for_all = [value(tokens, [(index, slice(0, 6))]) for index in range(3)]
        values = [value(tokens, drawn) for drawn in draws]
        assert mean(values) == pytest.approx(mean(one_for_all), rel=1e-12)
        variances.append((pvariance(values), pvariance(one_for_all)))
    drawn_each, drawn_once = map(mean, zip(*variances, strict=True))
    assert drawn_each < 0.5 * drawn_once


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_local_step_has_the_errors_of_all_outputs(tiny_model: Any, tokens: Tensor, kind: str):
    model = build(tiny_model, CONFIGS[kind], THREE)
    losses, passes = run(model, tokens, LOCAL)
    assert [weight for weight, _ in passes.others] == WEIGHTS[kind]
    _, raw = model.forward_raw(tokens)
    expected = torch.zeros(())
    for position in THREE:
        sae, act = model.saes.at(position), raw[position]
        acts = sae(act)
        expected = expected + 0.3 * acts.penalised.sum(dim=-1).mean() / 16
        expected = expected + 2.0 * (acts.output - act).square().mean()
        for index, weight in enumerate(WEIGHTS[kind]):
            error = (plain_other(sae, act, index) - act).square().mean()
            expected = expected + weight * 2.0 * error
    total, _ = total_loss(losses, passes)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(total, model.saes), gradients(expected, model.saes))


MLP, NEXT_MLP = "blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out"
TRANSCODED = {
    "other width": {MLP: "blocks.1.mlp.hook_post"},
    "heads": {"blocks.1.hook_resid_mid": "blocks.1.attn.hook_z"},
    "two": {MLP: "blocks.1.hook_resid_mid", NEXT_MLP: "blocks.1.hook_resid_post"},
    "from one to the next": {MLP: "blocks.1.hook_resid_mid", NEXT_MLP: MLP},
}


@pytest.fixture(params=TRANSCODED)
def transcoded(request: pytest.FixtureRequest, tiny_model: Any) -> SAETransformer:
    reads = TRANSCODED[request.param]
    sae = TranscoderConfig(dict_size_to_input_ratio=3, skip=True)
    return build(tiny_model, sae, list(reads), read_positions=list(reads.values()))


def plain_transcoder(sae: SAE, input: Tensor) -> Tensor:
    assert isinstance(sae, LinearSAE)
    c = (input @ sae.affine.weight.T + sae.affine.bias).relu()
    return c @ sae.decoder.elements + sae.decoder.bias + sae.get_submodule("skip")(input)


def test_transcoders_equal_plain_hooks(transcoded: SAETransformer, tokens: Tensor):
    losses, passes = run(transcoded, tokens, E2E)
    total, _ = total_loss(losses, passes)
    errors, sparsity = plain_e2e(transcoded, tokens, plain_transcoder)
    expected = errors + 0.3 * sparsity
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(total, transcoded.saes), gradients(expected, transcoded.saes))


def test_a_local_transcoder_is_to_write_the_raw_act(transcoded: SAETransformer, tokens: Tensor):
    _, passes = run(transcoded, tokens, LOCAL)
    _, raw = transcoded.forward_raw(tokens)
    for position, acts in passes.sae_acts.items():
        source = raw[transcoded.reads[position]]
        torch.testing.assert_close(acts.input, source.flatten(start_dim=2))
        torch.testing.assert_close(acts.target, raw[position].flatten(start_dim=2))
        assert not acts.target.requires_grad


@pytest.mark.parametrize("kind", CONFIGS)
def test_other_outputs_are_in_the_precision_of_the_sae(tiny_model: Any, tokens: Tensor, kind: str):
    model = build(tiny_model, CONFIGS[kind], ["blocks.1.hook_mlp_out"])
    model.hooked_model.product_dtype = torch.bfloat16
    _, passes = run(model, tokens, {"logits_kl": {"coeff": 1}, "out_to_in": {"coeff": 1}})
    ((_, other),) = passes.others
    for acts in (*passes.sae_acts.values(), *other.sae_acts.values()):
        assert acts.output.dtype == torch.float32


def test_a_cross_entropy_needs_no_raw_run(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, TopKSAEConfig(dict_size_to_input_ratio=3, k=3), RESID)
    losses, passes = run(model, tokens, {"next_token_ce": {"coeff": 1}})
    plan = derive_plan(model, losses)
    assert (plan.raw_positions, plan.raw_stop) == ((), 0)
    assert passes.orig_resid is None
    logits, _ = model(tokens)
    expected = F.cross_entropy(logits[:, :-1].flatten(end_dim=1), tokens[:, 1:].flatten())
    assert total_loss(losses, passes)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_transcoder_cannot_read_what_it_writes_under_another_name(tiny_bridge: Any):
    names = ["blocks.1.hook_in", "blocks.1.hook_resid_pre"]
    sae = TranscoderConfig(dict_size_to_input_ratio=3)
    with pytest.raises(UserError, match="is also where its SAE writes"):
        SAETransformer(tiny_bridge, names[:1], sae=sae, read_positions=names[1:])


def test_losses_of_dead_elements_train_no_earlier_sae(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, TopKSAEConfig(dict_size_to_input_ratio=3, k=3), [RESID[0], LATER])
    losses, passes = run(model, tokens, {"aux_k": {"coeff": 1}, "next_token_ce": {"coeff": 0}})
    dead = {name: torch.arange(sae.n_dict) >= 24 for name, sae in passes.saes.items()}
    dead[RESID[0]].zero_()
    total, _ = total_loss(losses, replace(passes, dead=dead))
    assert not any(name.startswith("blocks-1") for name in gradients(total, model.saes))


def test_a_raw_pass_that_stops_early_leaves_no_final_residual_stream(
    tiny_model: Any, tokens: Tensor
):
    model = SAETransformer(tiny_model, RESID, dict_size_to_input_ratio=2.0)
    _, passes = run(model, tokens, {"next_token_ce": {"coeff": 1}, "out_to_orig": {"coeff": 1}})
    assert passes.new_resid is not None
    assert passes.orig_resid is None
