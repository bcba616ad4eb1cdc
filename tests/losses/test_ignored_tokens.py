from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify import ablate
from sparsify.evaluation.evaluate import evaluate
from sparsify.evaluation.intervention_effect import intervention_effect
from sparsify.losses.ignored_tokens import IgnoredTokens
from sparsify.losses.kept import kept_mask, targets_of
from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.losses.total import total_loss
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.acts import SAEActs
from sparsify.saes.config import MatryoshkaSAEConfig, ReLUSAEConfig, SAEConfig
from sparsify.settings.base_config import UserError
from sparsify.training.forward_passes import forward_passes
from sparsify.training.forward_plan import derive_plan

BOS = 7
TWO = ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"]
LATER = "blocks.2.hook_resid_mid"
RELU = ReLUSAEConfig(dict_size_to_input_ratio=3)
MATRYOSHKA = MatryoshkaSAEConfig(dict_size_to_input_ratio=3, k=4, prefix_shares=[0.5])
IGNORED = IgnoredTokens(bos=True, first_n=1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"bos": True}, [[0, 1, 1, 0], [1, 1, 1, 1]]),
        ({"first_n": 2}, [[0, 0, 1, 1], [0, 0, 1, 1]]),
        ({"bos": True, "first_n": 1}, [[0, 1, 1, 0], [0, 1, 1, 1]]),
    ],
)
def test_kept_tokens_by_hand(fields: dict[str, Any], expected: list[list[int]]):
    tokens = torch.tensor([[BOS, 1, 2, BOS], [3, 4, 5, 6]])
    kept = kept_mask(tokens, IgnoredTokens(**fields), BOS)
    assert kept.dtype == torch.bool
    assert kept.int().tolist() == expected


def test_the_first_positions_need_no_bos_token():
    IgnoredTokens(first_n=3).check(None)
    mask = kept_mask(torch.zeros(1, 2).int(), IgnoredTokens(first_n=1), None)
    assert mask.tolist() == [[False, True]]


def test_a_mask_without_effect_is_rejected():
    with pytest.raises(ValueError, match="leaves no token out; set bos or first_n"):
        IgnoredTokens()


def test_a_mask_of_a_token_that_there_is_not_is_rejected():
    with pytest.raises(UserError, match="tokenizer of train_data has no BOS token; set first_n"):
        IgnoredTokens(bos=True).check(None)


@pytest.fixture
def tokens() -> Tensor:
    tokens = torch.randint(8, 64, (3, 6))
    tokens[0, 3] = tokens[1, 5] = tokens[2, 0] = BOS
    return tokens


def build(tlens_model: Any, sae: SAEConfig) -> SAETransformer:
    """With predictions far from uniform."""
    with torch.no_grad():
        for name, parameter in tlens_model.named_parameters():
            if parameter.dim() > 1 and "embed" in name:
                parameter.mul_(4)
    return SAETransformer(tlens_model, TWO, sae=sae)


def run(model: SAETransformer, tokens: Tensor, losses: LossConfig) -> Passes:
    return forward_passes(model, tokens, derive_plan(model, losses))


MIX = {
    "sparsity": {"coeff": 0.3},
    "out_to_in": {"coeff": 0.5},
    "out_to_orig": {"coeff": 0.7},
    "in_to_orig": {"total_coeff": 0.9, "hook_positions": LATER, "normalised": True},
    "logits_kl": {"coeff": 1.1},
    "next_token_ce": {"coeff": 1.3},
}


def plain_values(passes: Passes, tokens: Tensor, kept: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Mean losses over some tokens, each by itself."""

    def mean(of_token: Callable[[tuple[int, int]], Tensor], at: list[tuple[int, int]]) -> Tensor:
        return torch.stack([of_token(token) for token in at]).mean(dim=0)

    def error(pred: Tensor, target: Tensor) -> Tensor:
        return mean(lambda token: (pred[token] - target[token]).square().mean(), kept)

    assert passes.orig_resid is not None
    assert passes.new_resid is not None
    assert passes.unembed is not None
    orig, new = (
        F.log_softmax(passes.unembed(r), -1) for r in (passes.orig_resid, passes.new_resid)
    )
    values = {
        "logits_kl": mean(lambda at: (orig[at].exp() * (orig[at] - new[at])).sum(), kept),
        "next_token_ce": mean(
            lambda at: -new[at][tokens[at[0], at[1] + 1]],
            [(sample, pos) for sample, pos in kept if (sample, pos + 1) in kept],
        ),
    }
    for position, acts in passes.sae_acts.items():
        values[f"sparsity/{position}"] = mean(lambda at, c=acts.c: c[at].sum() / 16, kept)
        values[f"out_to_in/{position}"] = error(acts.output, acts.input)
        values[f"out_to_orig/{position}"] = error(acts.output, passes.orig_acts[position])
    raw = passes.orig_acts[LATER]
    centre = mean(lambda at: raw[at], kept)
    in_to_orig = error(passes.new_acts[LATER].input, raw) / error(centre.expand_as(raw), raw)
    return {**values, f"in_to_orig/{LATER}": in_to_orig}


def test_losses_of_masked_runs_are_those_of_the_kept_tokens(tiny_model: Any, tokens: Tensor):
    model, losses = build(tiny_model, RELU), LossConfig.model_validate(MIX)
    passes = run(model, tokens, losses)
    kept = kept_mask(tokens, IGNORED, BOS)
    at = [(sample, pos) for sample in range(3) for pos in range(6) if kept[sample, pos]]
    assert len(at) == 13  # 18, less 3 first ones, of which one is BOS, and 2 more of BOS
    total, values = total_loss(losses, passes.only(kept))
    expected = plain_values(passes, tokens, at)
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}
    )
    weighted = [
        losses.terms()[name.split("/")[0]].position_coeff * v for name, v in expected.items()
    ]
    parameters = list(model.saes.parameters())
    grads = torch.autograd.grad(total, parameters, retain_graph=True)
    expected_grads = torch.autograd.grad(torch.stack(weighted).sum(), parameters)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)


def test_other_outputs_are_masked_too(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, MATRYOSHKA)
    losses = LossConfig.model_validate({"out_to_in": {"coeff": 1.0}})
    passes, kept = run(model, tokens, losses), kept_mask(tokens, IGNORED, BOS)
    _, values = total_loss(losses, passes.only(kept))
    for position, acts in passes.sae_acts.items():
        error = model.saes.at(position).other_output(acts, 0)[kept] - acts.input[kept]
        value = values[f"other_outputs/out_to_in/{position}"]
        assert value.item() == pytest.approx(error.square().mean().item())


def test_masked_acts_keep_all_that_an_sae_left_behind():
    kept = torch.tensor([[True, False], [False, True]])
    widths = {"input": 3, "c": 5, "output": 4, "replaced": 4, "pre_acts": 5, "gates": 5}
    assert {*widths, "norms"} == {field.name for field in fields(SAEActs)}
    norms = torch.rand(5)  # of elements, not of tokens
    rows = {name: torch.randn(2, 2, width) for name, width in widths.items()}
    acts = SAEActs(norms=norms, **rows)
    assert acts.only(kept).norms is norms
    for name, of_all in rows.items():
        assert getattr(acts.only(kept), name).equal(torch.stack([of_all[0, 0], of_all[1, 1]]))


def plain_metrics(model: SAETransformer, tokens: Tensor, kept: Tensor) -> dict[str, float]:
    """From full logits, with all unkept tokens taken out at the end."""
    has_next = kept[:, :-1] & kept[:, 1:]

    def cross_entropy(logits: Tensor) -> float:
        return F.cross_entropy(logits[:, :-1][has_next], tokens[:, 1:][has_next]).item()

    raw_logits, raw = model.forward_raw(tokens)
    logits, acts = model(tokens)
    assert raw_logits is not None
    log_raw, log_new = raw_logits.log_softmax(-1)[kept], logits.log_softmax(-1)[kept]

    def write_mean(position: str) -> Callable[[Tensor], Tensor]:
        return lambda act: raw[position][kept].mean(dim=0).expand(act.shape)

    ablated = model.hooked_model.run_with_logits(tokens, {p: write_mean(p) for p in TWO})
    metrics = {
        "performance/eval/ce_loss_raw": cross_entropy(raw_logits),
        "performance/eval/ce_loss": cross_entropy(logits),
        "performance/eval/ce_loss_mean_ablated": cross_entropy(ablated),
        "performance/eval/top1_agreement": (log_raw.argmax(-1) == log_new.argmax(-1))
        .float()
        .mean(),
        "loss/eval/logits_kl": (log_raw.exp() * (log_raw - log_new)).sum(-1).mean(),
    }
    for position in TWO:
        input, c, output = (
            getattr(acts[position], name)[kept] for name in ("input", "c", "output")
        )
        errors = (output - input).square().sum(-1)
        deviations = (input - input.mean(dim=0)).square().sum(-1)
        name = "loss/eval/out_to_in"
        metrics |= {
            f"sparsity/eval/L_0/{position}": (c != 0).sum(-1).float().mean(),
            f"sparsity/alive_dict_elements/{position}": (c != 0).any(0).sum(),
            f"{name}/{position}": errors.mean() / 16,
            f"{name}/explained_variance/{position}": (1 - errors / deviations).mean(),
            f"{name}/explained_variance_ratio_of_sums/{position}": 1
            - errors.sum() / deviations.sum(),
            f"{name}/l2_ratio/{position}": (output.norm(dim=-1) / input.norm(dim=-1)).mean(),
        }
    return {name: float(value) for name, value in metrics.items()}


def test_an_evaluation_is_about_the_kept_tokens(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, RELU)
    kept = kept_mask(tokens, IGNORED, BOS)
    result = evaluate(
        model, tokens.split(2), kept=lambda batch: kept_mask(batch, IGNORED, BOS), chunk_size=4
    )
    # Of 13 kept tokens, in runs of 2, 2, 4 and 5, the last of each run predicts none of them.
    assert (result.n_samples, result.n_tokens, result.n_predictions) == (3, 13, 9)
    with torch.no_grad():
        expected = plain_metrics(model, tokens, kept)
    metrics = result.metrics()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert metrics != pytest.approx(evaluate(model, [tokens]).metrics(), rel=1e-3)


def test_keeping_all_tokens_changes_nothing(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, RELU)
    all_kept = evaluate(model, [tokens], kept=lambda batch: torch.ones_like(batch).bool())
    assert all_kept.metrics() == pytest.approx(evaluate(model, [tokens]).metrics(), nan_ok=True)


LENGTHS = [4, 6, 7, 9, 11]
PAD = 63


def test_targets_of_kept_tokens_by_hand():
    tokens = torch.tensor([[BOS, 1, 2, BOS, 3], [4, 5, BOS, 6, 2]]).to(torch.int16)
    assert targets_of(tokens).tolist() == [[1, 2, BOS, 3, -100], [5, BOS, 6, 2, -100]]
    kept = kept_mask(tokens, IgnoredTokens(bos=True), BOS)
    expected = [[-100, 2, -100, -100, -100], [5, -100, -100, 2, -100]]
    assert targets_of(tokens, kept).tolist() == expected


@pytest.mark.parametrize("batch_size", [5, 2])
def test_predictions_of_padding_count_nowhere(tiny_model: Any, batch_size: int):
    model = build(tiny_model, RELU)
    prompts = [torch.randint(8, PAD, (1, length)) for length in LENGTHS]
    tokens = torch.cat([F.pad(prompt, (0, 11 - prompt.shape[1]), value=PAD) for prompt in prompts])

    def kept(batch: Tensor) -> Tensor:
        return batch != PAD

    def cross_entropy(run: Callable[[Tensor], Tensor]) -> float:
        """Of each prompt without padding, as the next token's negative log-probability."""
        with torch.no_grad():
            logs = [run(prompt)[0].double().log_softmax(dim=-1) for prompt in prompts]
        pairs = zip(logs, prompts, strict=True)
        found = [-log[:-1].gather(1, prompt[0, 1:, None]) for log, prompt in pairs]
        assert sum(map(len, found)) == 37 - 5
        return torch.cat(found).mean().item()

    raw = cross_entropy(lambda prompt: model.tlens_model(prompt))
    spliced = cross_entropy(lambda prompt: model(prompt)[0])
    result = evaluate(model, tokens.split(batch_size), kept=kept)
    assert (result.n_tokens, result.n_predictions) == (37, 32)
    assert (result.ce_loss_raw, result.ce_loss) == pytest.approx((raw, spliced), rel=1e-6)
    effect = intervention_effect(model, tokens.split(batch_size), ablate(TWO[0], 0), kept=kept)
    assert (effect.n_tokens, effect.n_predictions) == (37, 32)
    assert (effect.ce_loss_raw, effect.ce_loss) == pytest.approx((raw, spliced), rel=1e-6)
    losses = LossConfig.model_validate({"next_token_ce": {"coeff": 1.0}})
    passes = run(model, tokens, losses).only(kept(tokens))
    assert (passes.n_tokens, passes.n_predictions) == (37, 32)
    assert total_loss(losses, passes)[0].item() == pytest.approx(spliced, rel=1e-6)


def test_a_batch_of_which_nothing_is_kept_changes_nothing(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, RELU)
    ignored = torch.full((2, 4), BOS)

    def kept(batch: Tensor) -> Tensor:
        return batch != BOS

    expected = evaluate(model, [tokens], kept=kept)
    found = evaluate(model, [ignored, tokens], kept=kept)
    assert (found.n_tokens, found.n_predictions) == (expected.n_tokens, expected.n_predictions)
    assert found.metrics() == pytest.approx(expected.metrics(), nan_ok=True)
    change = ablate(TWO[0], 0)
    effect = intervention_effect(model, [ignored, tokens], change, kept=kept)
    assert effect == intervention_effect(model, [tokens], change, kept=kept)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda batch: batch < 0, "kept: leaves no prediction of the next token in 18 tokens; a p"),
        # Every second position: of no prediction are both kept.
        (lambda batch: torch.arange(6).expand_as(batch) % 2 == 0, "kept: leaves no prediction"),
        (lambda batch: batch.clamp(max=1), r"kept: gives torch.int64 of shape .*; give a boolean"),
        (lambda batch: batch[:, 1:] > 0, r"kept: gives torch.bool of shape \(3, 5\) for tokens"),
    ],
)
def test_a_mask_that_leaves_nothing_or_is_none_is_rejected(
    tiny_model: Any, tokens: Tensor, kept: Callable[[Tensor], Tensor], message: str
):
    model = build(tiny_model, RELU)
    with pytest.raises(UserError, match=message):
        evaluate(model, [tokens], kept=kept)
    with pytest.raises(UserError, match=message):
        intervention_effect(model, [tokens], ablate(TWO[0], 0), kept=kept)
