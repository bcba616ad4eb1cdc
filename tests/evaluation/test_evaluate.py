from collections.abc import Callable
from typing import Any

import pytest
import torch
from example_saes import FailingSAE, IdentitySAE
from torch import Tensor
from torch.nn import functional as F

from sparsify.evaluation.evaluate import evaluate
from sparsify.evaluation.results import Evaluation
from sparsify.kernels.unembedding import Unembedding
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.acts import SAEActs
from sparsify.saes.base import SAE
from sparsify.settings.base_config import UserError

pytestmark = pytest.mark.model

RESID = ["blocks.1.hook_resid_pre"]
SITES = [RESID, ["blocks.0.hook_resid_pre"], ["blocks.2.hook_resid_post"], ["blocks.1.attn.hook_z"]]
SEVERAL = ["blocks.1.attn.hook_z", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre"]


class ConstantSAE(IdentitySAE):
    """Writes the same for every token, whatever it reads."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__(len(vector))
        self.vector = vector

    def encode(self, input: Tensor) -> Tensor:
        return super().encode(torch.zeros_like(input))

    def decode(self, c: Tensor) -> Tensor:
        return super().decode(c) + self.vector


def put_saes(model: SAETransformer, make: Callable[[str, int], SAE]) -> None:
    for position in model.raw_sae_positions:
        model.saes[position.replace(".", "-")] = make(position, model.saes.at(position).d_act)


@pytest.fixture
def tokens(tiny_model: Any) -> Tensor:
    """Text that the model expects, so that an ablation hurts."""
    tokens = torch.randint(64, (5, 3))
    while tokens.shape[1] < 12:
        with torch.no_grad():
            tokens = torch.cat([tokens, tiny_model(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    return tokens


def build(tiny_model: Any, positions: list[str]) -> SAETransformer:
    return SAETransformer(tiny_model, positions, dict_size_to_input_ratio=3.0)


def assert_same(actual: Evaluation, expected: Evaluation) -> None:
    assert actual.metrics() == pytest.approx(expected.metrics(), rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("positions", [*SITES, SEVERAL])
def test_an_sae_that_returns_its_input_loses_nothing(
    tiny_model: Any, tokens: Tensor, positions: list[str]
):
    model = build(tiny_model, positions)
    put_saes(model, lambda _, d_act: IdentitySAE(d_act))
    result = evaluate(model, [tokens])
    assert result.ce_loss_increase == pytest.approx(0, abs=1e-6)
    assert result.logits_kl == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1
    assert result.ce_recovered_zero == pytest.approx(1)
    assert result.ce_recovered_mean == pytest.approx(1)
    assert list(result.positions) == model.raw_sae_positions
    for sae in result.positions.values():
        assert sae.explained_variance == pytest.approx(1)
        assert sae.explained_variance_per_token == pytest.approx(1)
        assert sae.explained_variance_per_token_std == pytest.approx(0, abs=1e-6)
        assert sae.l2_ratio == pytest.approx(1)
        assert sae.mse == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("positions", [*SITES, SEVERAL])
def test_an_sae_that_writes_zeros_is_the_zero_ablation(
    tiny_model: Any, tokens: Tensor, positions: list[str]
):
    model = build(tiny_model, positions)
    put_saes(model, lambda _, d_act: ConstantSAE(torch.zeros(d_act)))
    result = evaluate(model, [tokens])
    assert result.ce_loss == result.ce_loss_zero_ablated
    assert result.ce_loss > result.ce_loss_raw + 0.01
    assert result.ce_recovered_zero == 0
    for sae in result.positions.values():
        assert (sae.l0, sae.n_alive, sae.l2_ratio) == (0, 0, 0)


@pytest.mark.parametrize("positions", [*SITES, SEVERAL])
def test_an_sae_that_writes_the_mean_activation_is_the_mean_ablation(
    tiny_model: Any, tokens: Tensor, positions: list[str]
):
    model = build(tiny_model, positions)
    _, acts = model.forward_raw(tokens)
    means = {name: act.flatten(start_dim=2).mean(dim=(0, 1)) for name, act in acts.items()}
    put_saes(model, lambda position, _: ConstantSAE(means[position]))
    result = evaluate(model, [tokens])
    assert result.ce_loss == pytest.approx(result.ce_loss_mean_ablated, abs=1e-6)
    assert result.ce_recovered_mean == pytest.approx(0, abs=1e-4)
    first = result.positions[model.raw_sae_positions[0]]
    assert first.explained_variance == pytest.approx(0, abs=1e-5)


def plain_cross_entropy(logits: Tensor, tokens: Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def plain_pass(model: SAETransformer, tokens: Tensor, hooks: dict[str, Any]) -> float:
    logits = model.hooked_model.run_with_logits(tokens, hooks)
    return plain_cross_entropy(logits, tokens)


def write_mean_of(raw_act: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda act: raw_act.mean(dim=(0, 1)).expand(act.shape)


def plain_sae_metrics(acts: SAEActs, position: str) -> dict[str, float]:
    errors = (acts.output - acts.input).square().sum(dim=-1)
    deviations = (acts.input - acts.input.mean(dim=(0, 1))).square().sum(dim=-1)
    ratios = 1 - errors / deviations
    fired = acts.c != 0
    name = "loss/eval/out_to_in"
    return {
        f"{name}/{position}": F.mse_loss(acts.output, acts.input).item(),
        f"{name}/explained_variance/{position}": ratios.mean().item(),
        f"{name}/explained_variance_std/{position}": ratios.std().item(),
        f"{name}/explained_variance_ratio_of_sums/{position}": (
            1 - errors.sum() / deviations.sum()
        ).item(),
        f"{name}/l2_ratio/{position}": (acts.output.norm(dim=-1) / acts.input.norm(dim=-1))
        .mean()
        .item(),
        f"sparsity/eval/L_0/{position}": fired.sum(dim=-1).float().mean().item(),
        f"sparsity/alive_dict_elements/{position}": fired.any(dim=0).any(dim=0).sum().item(),
    }


@pytest.mark.parametrize("model_fixture", ["tiny_model", "tiny_bridge"])
@pytest.mark.parametrize("positions", [RESID, SEVERAL])
def test_numbers_are_those_of_plain_passes_with_full_logits(
    request: pytest.FixtureRequest, tokens: Tensor, model_fixture: str, positions: list[str]
):
    model = build(request.getfixturevalue(model_fixture), positions)
    with torch.no_grad():
        orig_logits, orig_acts = model.forward_raw(tokens)
        logits, acts = model.forward(tokens)
        assert orig_logits is not None
        assert logits is not None
        zeros = dict.fromkeys(positions, torch.zeros_like)
        means = {name: write_mean_of(orig_acts[name]) for name in positions}
        expected = {
            "performance/eval/ce_loss_raw": plain_cross_entropy(orig_logits, tokens),
            "performance/eval/ce_loss": plain_cross_entropy(logits, tokens),
            "performance/eval/ce_loss_zero_ablated": plain_pass(model, tokens, zeros),
            "performance/eval/ce_loss_mean_ablated": plain_pass(model, tokens, means),
            "performance/eval/top1_agreement": (orig_logits.argmax(-1) == logits.argmax(-1))
            .float()
            .mean()
            .item(),
            "loss/eval/logits_kl": F.kl_div(
                logits.log_softmax(-1).flatten(0, 1),
                orig_logits.log_softmax(-1).flatten(0, 1),
                log_target=True,
                reduction="batchmean",
            ).item(),
        }
    for position, sae_acts in acts.items():
        assert isinstance(sae_acts, SAEActs)
        expected |= plain_sae_metrics(sae_acts, position)
    metrics = evaluate(model, [tokens], chunk_size=7).metrics()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_batch_size_changes_nothing(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, SEVERAL)
    whole = evaluate(model, [tokens])
    assert (whole.n_samples, whole.n_tokens, whole.n_predictions) == (5, 60, 55)
    for batch_size in (1, 3):
        assert_same(evaluate(model, tokens.split(batch_size)), whole)


def test_sequences_of_different_length_count_by_token(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, RESID)
    short, long = tokens[:2, :4], tokens[2:]
    both = evaluate(model, [short, long])
    parts = [evaluate(model, [part]) for part in (short, long)]
    # 2 * 3 predictions and 3 * 11.
    ce_loss = (6 * parts[0].ce_loss + 33 * parts[1].ce_loss) / 39
    assert both.ce_loss == pytest.approx(ce_loss, rel=1e-6)


def test_logits_exist_for_a_chunk_at_a_time(
    tiny_model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
):
    model = build(tiny_model, RESID)
    whole = evaluate(model, [tokens])
    n_rows = []
    transformed = Unembedding.transformed

    def counted(unembed: Unembedding, products: Tensor) -> Tensor:
        n_rows.append(len(products))
        return transformed(unembed, products)

    monkeypatch.setattr(Unembedding, "transformed", counted)
    assert_same(evaluate(model, [tokens], chunk_size=25), whole)
    assert n_rows == [25] * 4 + [25] * 4 + [10] * 4  # 60 tokens in four passes


def test_logits_that_are_computed_in_another_way_are_refused_at_once(tiny_model: Any):
    tiny_model.unembed.register_forward_hook(lambda *call: call[-1] + 1)
    with pytest.raises(UserError, match=r"^tlens_model: its logits are not"):
        evaluate(build(tiny_model, RESID), [torch.tensor([[0]])])  # too short, too


def test_blocks_before_the_first_sae_run_once_in_each_reading(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, ["blocks.1.hook_mlp_out"])
    calls = [0, 0, 0]
    handles = []
    for index, block in enumerate(tiny_model.blocks):

        def count(*_: object, index: int = index) -> None:
            calls[index] += 1

        handles.append(block.attn.register_forward_hook(count))
    evaluate(model, [tokens])
    for handle in handles:
        handle.remove()
    # The first reading needs block 1 once more, for the mean of its MLP's output, and no block 2.
    assert calls == [2, 5, 4]


def n_torch_hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tiny_model: Any, tokens: Tensor, fails: bool):
    model = build(tiny_model, SEVERAL)
    model.saes.train()
    tiny_model.eval()
    if fails:
        put_saes(model, lambda _, d_act: FailingSAE(d_act).train())
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluate(model, [tokens])
    else:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        evaluate(model, [tokens])
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert n_torch_hooks(tiny_model) == 0
    assert all(sae.training for sae in model.saes.modules())
    assert not any(module.training for module in tiny_model.modules())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_continues_after_an_evaluation(tiny_model: Any, tokens: Tensor):
    model = build(tiny_model, SEVERAL)
    evaluate(model, [tokens])
    logits, _ = model(tokens)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.saes.parameters())


class Shrinking:
    """Gives fewer batches the second time."""

    def __init__(self, tokens: Tensor) -> None:
        self.batches = [tokens, tokens]

    def __iter__(self) -> Any:
        batches, self.batches = self.batches, self.batches[:1]
        return iter(batches)


@pytest.mark.parametrize(
    ("make_batches", "message"),
    [
        (lambda tokens: iter([tokens]), "batches: a list_iterator can be read only once"),
        (lambda _: [], "batches: hold no tokens"),
        (lambda tokens: [tokens[:, :1]], "a sequence of 1 tokens has no next token"),
        (Shrinking, "gave 120 tokens when first read, and 60 when read again"),
    ],
)
def test_bad_batches_are_rejected(
    tiny_model: Any, tokens: Tensor, make_batches: Callable[[Tensor], Any], message: str
):
    model = build(tiny_model, RESID)
    with pytest.raises(ValueError, match=message):
        evaluate(model, make_batches(tokens))
