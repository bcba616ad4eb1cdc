import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.losses.loss import LossConfig
from sparsify.sae_transformer import SAETransformer
from sparsify.scripts.benchmark import floor, measure, techniques
from sparsify.scripts.benchmark.reference_step import ReferenceStepper
from sparsify.scripts.benchmark.run_benchmark import main
from sparsify.scripts.benchmark.shapes import MODES, SHAPES, TECHNIQUES, Shape
from sparsify.scripts.benchmark.techniques import switched_off
from sparsify.tlens.hooked_model import TLENS_HAS_HOOKED_TRANSFORMER
from sparsify.training.forward_plan import derive_plan

pytestmark = pytest.mark.model

SMALL = Shape(3, 16, 2, 64, batch_size=4, n_ctx=8, block=1, ratio=32.0)
CPU = torch.device("cpu")


def build() -> SAETransformer:
    model = SAETransformer(measure.build_model(SMALL, CPU), SMALL.position, SMALL.ratio)
    measure.make_sparse(model, SMALL.position, torch.randint(64, (4, 8)))
    return model


@pytest.mark.parametrize("mode", MODES)
def test_both_steps_compute_the_same(mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "LR", 1e-2)
    model, loss = build(), LossConfig.model_validate(SMALL.loss(mode))
    sae = model.saes.at(SMALL.position)
    reference = ReferenceStepper(model.tlens_model, sae, SMALL.position, loss, lr=1e-2)
    ours = measure.OurStepper(model, loss)
    for _ in range(3):
        tokens = torch.randint(64, (4, 8))
        torch.testing.assert_close(ours.step(tokens), reference.step(tokens), rtol=1e-4, atol=1e-5)
    trained = {name: weight.detach() for name, weight in sae.named_parameters()}
    for name, weight in (("encoder.0.bias", reference.b_enc), ("decoder.bias", reference.b_dec)):
        torch.testing.assert_close(trained[name], weight.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*TECHNIQUES, "all"])
def test_the_plain_way_gives_the_same(mode: str, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sparsify.kernels.sparse.MIN_DENSE_SIZE", 0)
    monkeypatch.setattr("sparsify.kernels.sparse.MAX_ACTIVE_SHARE", 1.0)
    loss = LossConfig.model_validate(SMALL.loss(mode))
    weights = []
    batches = torch.randint(64, (3, 4, 8))
    for without in ((), TECHNIQUES if name == "all" else (name,)):
        torch.manual_seed(0)
        with switched_off(without):
            model = build()
            stepper = measure.OurStepper(model, loss)
            for tokens in batches:
                stepper.step(tokens)
        weights.append([weight.detach() for weight in model.saes.parameters()])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_step_takes_the_plain_way(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sparsify.kernels.sparse.MIN_DENSE_SIZE", 0)
    monkeypatch.setattr("sparsify.kernels.sparse.MAX_ACTIVE_SHARE", 1.0)
    plain_ways = techniques._PLAIN_WAYS[name]
    taken: set[int] = set()

    def counted(index: int, plain: Callable[..., Any]) -> Callable[..., Any]:
        def plain_way(*args: Any, **kwargs: Any) -> Any:
            taken.add(index)
            return plain(*args, **kwargs)

        return plain_way

    for index, plain_way in enumerate(plain_ways):
        monkeypatch.setattr(plain_way, "new", counted(index, plain_way.new))
    with switched_off([name]):
        stepper = measure.OurStepper(build(), LossConfig.model_validate(SMALL.loss("e2e")))
        stepper.step(torch.randint(64, (4, 8)))
    expected = set(range(len(plain_ways)))
    if name == "fused-blocks":  # of a HookedTransformer, or of a bridge
        expected = {0} if TLENS_HAS_HOOKED_TRANSFORMER else {1}
    assert taken == expected


def test_sae_is_as_sparse_as_a_trained_one():
    stepper = measure.OurStepper(build(), LossConfig.model_validate(SMALL.loss("local")))
    stepper.measure_l0(torch.randint(64, (32, 8)))
    assert 16 < stepper.l0 < 64


def test_operations_of_a_step_by_hand():
    model = build()
    n_tokens, d, n_dict, vocab, l0 = 32, 16, 512, 64, 30
    block, attention = 2 * (4 * d**2 + 8 * d**2), 2 * 8 * d
    sae = 2 * d * n_dict + 8 * d * l0
    # One block before the SAE, a raw suffix of two, a spliced one of two, forward and backward.
    e2e = 3 * (block + attention) + 2 * (2 * block + 3 * attention) + 6 * d * vocab + sae
    for mode, expected in (("local", block + attention + sae), ("e2e", e2e)):
        loss = LossConfig.model_validate(SMALL.loss(mode))
        plan = derive_plan(model, loss)
        assert floor.step_flops(SMALL, plan, l0) == n_tokens * expected


@pytest.mark.slow
def test_a_row_is_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(SHAPES, "small", SMALL)
    path = tmp_path / "rows.json"
    options = ["--shape", "small", "--mode", "e2e", "--n-steps", "2", "--json", str(path)]
    assert main([*options, "--without", "sparse-sae"]) == 0
    (row,) = json.loads(path.read_text())
    assert (row["shape"], row["mode"]) == ("small", "e2e")
    ratio = row["tokens_per_s"] / row["reference_tokens_per_s"]
    assert row["speedup"] == pytest.approx(ratio)
    assert min(row["extra_mb"], row["reference_extra_mb"], row["floor_ratio"]) > 0
    assert row["without"] == ["sparse-sae"]
    out = capsys.readouterr().out
    assert "small      e2e" in out
    assert "without sparse-sae" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "huge"], "invalid choice: 'huge'"),
        (["--n-steps", "0"], "--n-steps: 0 gives no median; set it to 1 or more"),
        (["--json", "no/such/rows.json"], "--json: there is no folder 'no/such'; make it first"),
        (["--shape", "gpt2-full"], "--shape: gpt2-full needs a GPU; add --device cuda"),
    ],
)
def test_bad_options_are_rejected(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(options) == 2
    assert message in capsys.readouterr().err
