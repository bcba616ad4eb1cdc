import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from example_saes import IdentitySAE
from torch import Tensor
from torch.nn import functional as F

from sparsify.evaluation.evaluate import evaluate
from sparsify.evaluation.results import finite_or_none
from sparsify.evaluation.suite import RunningVariance, evaluate_suite, later_hooks, random_errors
from sparsify.evaluation.suite_results import PositionSuite, Suite
from sparsify.evaluation.suite_table import format_suite
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.acts import SAEActs
from sparsify.saes.config import TranscoderConfig

RESID = ["blocks.1.hook_resid_pre"]
HEADS = ["blocks.1.attn.hook_z"]
SEVERAL = ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.2.hook_resid_pre"]
DOWNSTREAM = "loss/eval/in_to_orig"
RATIO = "loss/eval/out_to_in/l2_ratio"


class ScalingSAE(IdentitySAE):
    """Writes a multiple of what it reads."""

    def __init__(self, d_act: int, scale: float) -> None:
        super().__init__(d_act)
        self.scale = scale

    def decode(self, c: Tensor) -> Tensor:
        return self.scale * super().decode(c)


class ShiftingSAE(IdentitySAE):
    """Adds a vector to what it reads."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__(len(vector))
        self.vector = vector

    def decode(self, c: Tensor) -> Tensor:
        return super().decode(c) + self.vector


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (5, 12))


def build(tiny_model: Any, positions: list[str]) -> SAETransformer:
    return SAETransformer(tiny_model, positions, dict_size_to_input_ratio=3.0)


def put_saes(model: SAETransformer, make: Callable[[int], IdentitySAE]) -> None:
    for position in model.raw_sae_positions:
        model.saes[position.replace(".", "-")] = make(model.saes.at(position).d_act)


# Parts


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (["blocks.1.hook_resid_pre"], ["blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"]),
        (["blocks.2.hook_mlp_out", "blocks.1.attn.hook_z"], ["blocks.2.hook_resid_pre"]),
        (["blocks.2.hook_mlp_out"], []),
        (["blocks.1.hook_resid_post"], []),
        (["blocks.2.hook_resid_post"], None),
    ],
)
def test_later_hooks_lie_behind_the_first_sae(positions: list[str], expected: list[str] | None):
    hooks = later_hooks(positions, n_blocks=3)
    last = "blocks.2.hook_resid_post"
    assert hooks == ([] if expected is None else list(dict.fromkeys([*expected, last])))


def test_random_errors_have_the_norms_of_the_saes():
    norms = torch.rand(4, 7) * 100
    errors = random_errors(norms, 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(errors.norm(dim=-1), norms)
    directions = F.normalize(errors.flatten(end_dim=1), dim=1)
    assert (directions @ directions.T).fill_diagonal_(0).abs().max() < 0.95
    again = random_errors(norms, 16, torch.Generator().manual_seed(0))
    assert torch.equal(errors, again)


def test_variance_of_batches_is_that_of_all_rows():
    rows = torch.randn(30, 5) + 1000.0  # far from zero: a difference of squares would lose digits
    variance = RunningVariance()
    for part in rows.split([1, 12, 17]):
        variance.add(part)
    wide = rows.double()
    expected = (wide - wide.mean(dim=0)).square().sum().item()
    assert variance.n == 30
    assert variance.deviations == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(variance.mean, wide.mean(dim=0))


def test_densities_are_counted_in_powers_of_ten():
    densities = torch.tensor([0.0, 0.0, 0.02, 0.5, 1.0], dtype=torch.float64)
    nearest = torch.zeros(5)
    sae = PositionSuite(1.0, 1.0, densities, nearest, nearest[2:])
    assert sae.is_alive.tolist() == [False, False, True, True, True]
    counts, edges = sae.density_histogram.counts, sae.density_histogram.edges
    # log10 of 0.02 is -1.70, of 0.5 -0.30 and of 1 is 0.
    bins = {edges[index]: n for index, n in enumerate(counts) if n}
    assert bins == {-1.75: 1, -0.5: 1, -0.25: 1}


# Laws and values of whole passes


@pytest.mark.model
@pytest.mark.parametrize("positions", [RESID, HEADS, SEVERAL])
def test_an_sae_that_returns_its_input_makes_no_error(
    tiny_model: Any, tokens: Tensor, positions: list[str]
):
    model = build(tiny_model, positions)
    put_saes(model, IdentitySAE)
    suite = evaluate_suite(model, [tokens])
    assert suite.random_error_kl == pytest.approx(0, abs=1e-6)
    assert len(suite.later) > 0
    for error in suite.later.values():
        assert error.mse == pytest.approx(0, abs=1e-9)
        assert error.explained_variance == pytest.approx(1)
    for sae in suite.positions.values():
        assert (sae.l2_ratio_first, sae.l2_ratio_rest) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.model
def test_without_an_error_there_is_no_ratio_of_kls(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, RESID)
    put_saes(model, IdentitySAE)
    suite = dataclasses.replace(evaluate_suite(model, [tokens]), random_error_kl=0.0)
    assert math.isnan(suite.error_kl_ratio)
    assert suite.to_json()["metrics"]["performance/eval/error_kl_ratio"] is None


@pytest.mark.model
def test_l2_ratio_is_that_of_the_scale(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, RESID)
    put_saes(model, lambda d_act: ScalingSAE(d_act, 0.25))
    metrics = evaluate_suite(model, [tokens]).metrics()
    assert metrics[f"{RATIO}_first/{RESID[0]}"] == pytest.approx(0.25)
    assert metrics[f"{RATIO}_rest/{RESID[0]}"] == pytest.approx(0.25)


@pytest.mark.model
@pytest.mark.parametrize("model_fixture", ["tiny_model", "tiny_bridge"])
@pytest.mark.parametrize("positions", [RESID, SEVERAL])
def test_numbers_are_those_of_plain_passes(
    request: pytest.FixtureRequest, tokens: Tensor, model_fixture: str, positions: list[str]
):
    model = build(request.getfixturevalue(model_fixture), positions)
    later = later_hooks(positions, n_blocks=3)
    with torch.no_grad():
        _, raw = model.forward_raw(tokens, cache_positions=later)
        _, new = model.forward(
            tokens, cache_positions=[hook for hook in later if hook not in positions]
        )
    expected: dict[str, float] = {}
    for hook in later:
        errors = (new[hook].input - raw[hook]).square()
        deviations = (raw[hook] - raw[hook].mean(dim=(0, 1))).square()
        expected[f"{DOWNSTREAM}/{hook}"] = errors.mean().item()
        explained = 1 - errors.sum() / deviations.sum()
        expected[f"{DOWNSTREAM}/explained_variance/{hook}"] = explained.item()
    for position in positions:
        acts = new[position]
        assert isinstance(acts, SAEActs)
        ratios = acts.output.norm(dim=-1) / acts.input.norm(dim=-1)
        expected[f"{RATIO}_first/{position}"] = ratios[:, 0].mean().item()
        expected[f"{RATIO}_rest/{position}"] = ratios[:, 1:].mean().item()
        elements = model.saes.at(position).dict_elements.detach()
        is_alive = (acts.c != 0).any(dim=0).any(dim=0)
        for name, rows in {"": elements, "_alive": elements[is_alive]}.items():
            cosines = (rows @ rows.T).fill_diagonal_(-1)
            key = f"dictionary/nearest_cosine{name}/{position}"
            expected[key] = cosines.max(dim=1).values.mean().item()
    suite = evaluate_suite(model, list(tokens.split([2, 3])))
    metrics = suite.metrics()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for position in positions:
        acts = new[position]
        assert isinstance(acts, SAEActs)
        densities = (acts.c != 0).double().mean(dim=(0, 1))
        torch.testing.assert_close(suite.positions[position].densities, densities)


@pytest.mark.model
@pytest.mark.parametrize("positions", [RESID, HEADS, SEVERAL])
def test_random_errors_are_added_to_the_raw_model_at_all_saes_at_once(
    tiny_model: Any, tokens: Tensor, positions: list[str]
):
    model = build(tiny_model, positions)
    put_saes(model, lambda d_act: ShiftingSAE(torch.full((d_act,), 0.5)))
    generator = torch.Generator().manual_seed(0)

    def add_error(act: Tensor) -> Tensor:
        d_act = act.flatten(start_dim=2).shape[2]
        error = torch.randn(*tokens.shape, d_act, generator=generator)
        norm = 0.5 * d_act**0.5  # of a vector of halves
        return act + (norm * error / error.norm(dim=-1, keepdim=True)).reshape(act.shape)

    with torch.no_grad():
        raw = model.tlens_model(tokens).log_softmax(-1)
        hooks = dict.fromkeys(model.raw_sae_positions, add_error)
        new = model.hooked_model.run_with_logits(tokens, hooks).log_softmax(-1)
    expected = (raw.exp() * (raw - new)).sum(dim=-1).mean().item()
    suite = evaluate_suite(model, [tokens])
    assert suite.random_error_kl == pytest.approx(expected, rel=1e-3)
    assert suite.random_error_kl > 0.01
    assert suite.error_kl_ratio == suite.evaluation.logits_kl / suite.random_error_kl


@pytest.mark.model
def test_the_suite_holds_what_evaluate_finds(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, SEVERAL)
    expected = evaluate(model, [tokens]).metrics()
    suite = evaluate_suite(model, [tokens])
    assert suite.metrics().items() >= expected.items()
    for position, sae in suite.positions.items():
        evaluated = suite.evaluation.positions[position]
        assert sae.is_alive.sum().item() == evaluated.n_alive
        assert sae.densities.sum().item() == pytest.approx(evaluated.l0)


@pytest.mark.model
def test_batch_size_changes_only_random_directions(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, SEVERAL)
    random = ("performance/eval/random_error_kl", "performance/eval/error_kl_ratio")

    def measured(batches: list[Tensor]) -> dict[str, float]:
        metrics = evaluate_suite(model, batches).metrics()
        return {name: value for name, value in metrics.items() if name not in random}

    whole = measured([tokens])
    parts = measured(list(tokens.split(2)))
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.model
def test_tokens_that_do_not_count_are_left_out_of_everything(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, RESID)

    def kept(batch: Tensor) -> Tensor:
        mask = torch.ones_like(batch, dtype=torch.bool)
        mask[:, 0] = False
        mask[0] = False  # so that a batch of one sequence has nothing that counts
        return mask

    suite = evaluate_suite(model, [*tokens[:1].split(1), tokens], kept=kept)
    plain = evaluate_suite(model, [tokens], kept=kept)
    assert suite.metrics() == pytest.approx(plain.metrics(), rel=1e-4, abs=1e-5, nan_ok=True)
    sae = plain.positions[RESID[0]]
    assert math.isnan(sae.l2_ratio_first)
    with torch.no_grad():
        _, raw = model.forward_raw(tokens)
        acts = model(tokens)[1][RESID[0]]
    mask = kept(tokens)
    ratios = acts.output[mask].norm(dim=-1) / raw[RESID[0]][mask].norm(dim=-1)
    assert sae.l2_ratio_rest == pytest.approx(ratios.mean().item(), rel=1e-5)
    densities = (acts.c[mask] != 0).double().mean(dim=0)
    torch.testing.assert_close(sae.densities, densities)


@pytest.mark.model
@pytest.mark.parametrize("model_fixture", ["tiny_model", "tiny_bridge"])
def test_a_transcoder_is_compared_with_what_it_stands_in_for(
    request: pytest.FixtureRequest, tokens: Tensor, model_fixture: str
):
    read, written = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    config = TranscoderConfig(dict_size_to_input_ratio=2.0)
    model = SAETransformer(
        request.getfixturevalue(model_fixture), written, sae=config, read_positions=read
    )
    with torch.no_grad():
        acts = model(tokens)[1][written]
    suite = evaluate_suite(model, [tokens])
    assert list(suite.later) == ["blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"]
    ratios = acts.output.norm(dim=-1) / acts.replaced.norm(dim=-1)
    sae = suite.positions[written]
    assert sae.l2_ratio_first == pytest.approx(ratios[:, 0].mean().item(), rel=1e-4)
    # The residual stream right behind it differs by its own error.
    error = suite.evaluation.positions[written].mse
    assert suite.later["blocks.2.hook_resid_pre"].mse == pytest.approx(error, rel=1e-3)


@pytest.mark.model
def test_behind_the_last_block_there_is_nothing_later(tiny_model: Any, tokens: Tensor):
    suite = evaluate_suite(build(tiny_model, ["blocks.2.hook_resid_post"]), [tokens])
    assert suite.later == {}
    assert "downstream" not in format_suite(suite)


# What is written


@pytest.fixture
def suite(tiny_model: Any, tokens: Tensor) -> Suite:
    return evaluate_suite(build(tiny_model, SEVERAL), [tokens])


def test_json_holds_all_metrics_and_histograms(suite: Suite):
    content = json.loads(json.dumps(suite.to_json(), allow_nan=False))
    assert content["metrics"] == finite_or_none(suite.metrics())
    assert content["n_tokens"] == 60
    for position, n_dict in content["n_dict"].items():
        densities = content["histograms"][f"log10_density/{position}"]
        assert sum(densities["counts"]) + densities["n_dead"] == n_dict
        assert sum(content["histograms"][f"nearest_cosine/{position}"]["counts"]) == n_dict
        n_alive = content["metrics"][f"sparsity/alive_dict_elements/{position}"]
        assert sum(content["histograms"][f"nearest_cosine_alive/{position}"]["counts"]) == n_alive


def test_table_shows_every_number_and_fits_on_a_terminal(suite: Suite):
    table = format_suite(suite)
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert max(map(len, table.splitlines())) <= 80
    assert any(f"{suite.random_error_kl:.4f}" in line for line in lines)
    for hook, error in suite.later.items():
        assert f"{hook} {error.mse:.4g} {error.explained_variance:.3f}" in lines
    for position, sae in suite.positions.items():
        ratios = f"{sae.l2_ratio_first:.3f} {sae.l2_ratio_rest:.3f}"
        means = f"{sae.nearest.mean():.3f} {sae.nearest_alive.mean():.3f}"
        assert f"{position} {ratios} {means}" in lines
