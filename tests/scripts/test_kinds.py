"""Every kind of SAE in every mix of the loss, and everything that helps in training them."""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from example_saes import KINDS
from safetensors.torch import load_file
from torch import Tensor

from sparsify import SAETransformer
from sparsify.runs import plots, saved
from sparsify.runs.config import PLACED
from sparsify.saes.acts import SAEActs
from sparsify.scripts.train_tlens_saes.run_train_tlens_saes import main
from sparsify.scripts.train_tlens_saes.sae_run import SAERun
from sparsify.tlens.hooked_model import TLensModel
from sparsify.tlens.loading import load_hooked_model

from .conftest import assert_same_end, run_in_one_piece, write_yaml
from .test_resume import stop_in_batch

pytestmark = [pytest.mark.slow, pytest.mark.model]

POSITION = "blocks.1.hook_resid_pre"
READ, WRITTEN = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"

SETTINGS: dict[str, dict[str, Any]] = {
    **KINDS,
    "transcoder": {**KINDS["transcoder"], "sae_positions": [WRITTEN], "read_positions": [READ]},
}
"""What each has besides what all have."""
PENALISED = {kind for kind, settings in KINDS.items() if "k" not in settings}

MIXES: dict[str, dict[str, Any]] = {
    "local": {"out_to_in": {"coeff": 1.0}},
    "e2e": {"logits_kl": {"coeff": 1.0}},
    "e2e + downstream": {
        "logits_kl": {"coeff": 0.5},
        "in_to_orig": {"hook_positions": ["blocks.2.hook_resid_post"], "total_coeff": 1.0},
    },
}

AIDS: dict[str, Any] = {
    "dead_elements": {"after_n_tokens": 64, "min_density": 0.02},
    "resampling": {"every_n_samples": 16, "until_n_samples": 16},
    "ignored_tokens": {"bos": True, "first_n": 1},
    "decoder_bias": "geometric_median",
}
SCHEDULE = {"warmup_samples": 16, "end_factor": 0.5}
AIDED: dict[str, dict[str, Any]] = {
    "jumprelu": {
        "logits_kl": {"coeff": 1.0, "schedule": SCHEDULE},
        "sparsity": {
            "coeff": 0.01,
            "penalty": "l0",
            "target_l0": 3.0,
            "target_warmup_samples": 20,
        },
        "aux_k": {"coeff": 0.1},
        "pre_act": {"coeff": 0.1},
    },
    "batch_topk": {"logits_kl": {"coeff": 1.0, "schedule": SCHEDULE}, "aux_k": {"coeff": 0.1}},
    # Which draws a prefix for each sequence.
    "matryoshka": {"logits_kl": {"coeff": 1.0, "schedule": SCHEDULE}, "aux_k": {"coeff": 0.1}},
}
"""The losses of runs with all that helps in training."""


@pytest.fixture(scope="module", autouse=True)
def _what_takes_most_of_the_time_is_left_out() -> Iterator[None]:
    @functools.cache
    def load_once(*args: Any, **kwargs: Any) -> TLensModel:
        # Loading draws random numbers, which must not set the run that loads apart from the others.
        with torch.random.fork_rng():
            return load_hooked_model(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "load_hooked_model", load_once)
        # As where matplotlib is not installed: the picture takes four fifths of a run.
        patch.setattr(plots, "find_spec", lambda name: None)
        yield


def content_of(settings: Mapping[str, Any], kind: str, loss: Mapping[str, Any]) -> dict[str, Any]:
    """A config that trains SAEs of a kind."""
    sparsity = {"sparsity": {"coeff": 0.01}} if kind in PENALISED else {}
    saes = {**settings["saes"], "kind": kind, **SETTINGS[kind]}
    return {**settings, "saes": saes, "loss": {**sparsity, **loss}, "eval_n_samples": 4}


def train_saes(
    content: dict[str, Any], folder: Path, *overrides: str
) -> tuple[SAETransformer, Path]:
    """The model that the script trains, as it is in its memory at the end, and the run's folder."""
    runs: list[SAERun] = []
    finish = SAERun.finish

    def keep_and_finish(run: SAERun, *rest: Any) -> str:
        runs.append(run)
        return finish(run, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAERun, "finish", keep_and_finish)
        config = write_yaml(folder / "config.yaml", {**content, "save_dir": str(folder / "out")})
        assert main([str(config), *overrides]) == 0
    (run,) = runs
    assert run.run_dir is not None
    return run.model, run.run_dir


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def by_name(metrics: list[dict[str, float]], name: str) -> list[float]:
    return [line[name] for line in metrics if name in line]


def assert_loads_as_it_was_trained(model: SAETransformer, run_dir: Path) -> SAETransformer:
    loaded = SAETransformer.from_local_path(run_dir)
    assert loaded.raw_sae_positions == model.raw_sae_positions
    assert loaded.reads == model.reads
    assert not loaded.training
    tokens = torch.randint(300, (3, 16))
    with torch.no_grad():
        logits, acts = model.eval()(tokens)
        loaded_logits, loaded_acts = loaded(tokens)
    assert isinstance(logits, Tensor)
    assert torch.equal(loaded_logits, logits)
    assert logits.isfinite().all()
    for position in model.raw_sae_positions:
        trained = acts[position]
        assert isinstance(trained, SAEActs)
        assert torch.equal(loaded_acts[position].c, trained.c)
        assert torch.equal(loaded_acts[position].output, trained.output)
        assert (trained.c != 0).any()
    return loaded


def assert_is_finite(run_dir: Path) -> None:
    metrics = json.loads((run_dir / "eval.json").read_text())["metrics"]
    # JSON has null in place of what is not finite.
    assert [name for name, value in metrics.items() if value is None] == []
    for line in read_metrics(run_dir):
        assert [name for name, value in line.items() if not math.isfinite(value)] == []


@pytest.fixture(scope="module")
def local_topk(sae_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to start from."""
    content = content_of(sae_settings, "topk", MIXES["local"])
    return run_in_one_piece(content, tmp_path_factory.mktemp("local_topk"))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_trained_saved_and_loaded(
    kind: str, mix: str, sae_settings: dict[str, Any], tmp_path: Path
):
    model, run_dir = train_saes(content_of(sae_settings, kind, MIXES[mix]), tmp_path)
    loaded = assert_loads_as_it_was_trained(model, run_dir)
    assert_is_finite(run_dir)
    metrics = read_metrics(run_dir)
    assert len(by_name(metrics, "grad_norm")) == 3
    assert min(by_name(metrics, "grad_norm")) > 0
    options = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    tokens = torch.randint(300, (2, 4))
    generated = loaded.generate(tokens, **options)
    assert isinstance(generated, Tensor)
    assert generated.shape == (2, 7)
    assert torch.equal(generated[:, :4], tokens)


def test_all_kinds_are_tried():
    assert KINDS.keys() == PLACED.keys()


@pytest.mark.parametrize("kind", ["matryoshka", "transcoder"])
def test_several_saes_of_a_kind(kind: str, sae_settings: dict[str, Any], tmp_path: Path):
    content = content_of(sae_settings, kind, MIXES["e2e"])
    several = {"sae_positions": ["blocks.2.hook_resid_pre", POSITION]}
    if kind == "transcoder":
        several = {"sae_positions": "hook_mlp_out", "read_positions": "ln2.hook_normalized"}
    model, run_dir = train_saes({**content, "saes": {**content["saes"], **several}}, tmp_path)
    assert len(model.raw_sae_positions) == (3 if kind == "transcoder" else 2)
    assert_loads_as_it_was_trained(model, run_dir)
    assert_is_finite(run_dir)


def test_transcoders_may_read_the_same_hook_point(sae_settings: dict[str, Any], tmp_path: Path):
    content = content_of(sae_settings, "transcoder", MIXES["e2e"])
    both = {
        "sae_positions": [WRITTEN, "blocks.2.hook_mlp_out"],
        "read_positions": [READ, READ],
    }
    model, run_dir = train_saes({**content, "saes": {**content["saes"], **both}}, tmp_path)
    assert list(model.reads.values()) == [READ, READ]
    assert_loads_as_it_was_trained(model, run_dir)


def test_a_transcoder_without_k_is_penalised_until_it_has_an_l0(
    sae_settings: dict[str, Any], tmp_path: Path
):
    loss = {**MIXES["e2e"], "sparsity": {"coeff": 0.01, "target_l0": 3.0}}
    content = content_of(sae_settings, "transcoder", loss)
    content["saes"]["k"] = None
    model, run_dir = train_saes(content, tmp_path)
    assert_loads_as_it_was_trained(model, run_dir)
    assert by_name(read_metrics(run_dir), f"coeff/train/sparsity/{WRITTEN}")[0] != 0.01


def aided(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """A config with all that helps in training."""
    content = content_of(settings, kind, AIDED[kind])
    # So that many elements do not fire at first.
    start = {"initial_threshold": 1.0} if kind == "jumprelu" else {}
    return {
        **content,
        **AIDS,
        "saes": {**content["saes"], "dict_size_to_input_ratio": 8.0, **start},
        "eval_every_n_samples": 8,
        "save_every_n_samples": 8,
        "train_data": {**content["train_data"], "n_epochs": None, "add_bos_token": True},
    }


@pytest.fixture(scope="module", params=AIDED)
def aided_kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(
    aided_kind: str, sae_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run with all that helps, in one piece."""
    folder = tmp_path_factory.mktemp(f"whole_{aided_kind}")
    return run_in_one_piece(aided(sae_settings, aided_kind), folder)


def test_all_that_helps_goes_on_after_a_stop_as_if_there_had_been_none(
    aided_kind: str, whole: Path, sae_settings: dict[str, Any], tmp_path: Path
):
    content = {**aided(sae_settings, aided_kind), "save_dir": str(tmp_path / "out")}
    config = write_yaml(tmp_path / "config.yaml", content)
    # After a step and a half: dead elements, coefficients and gradients are all under way, and
    # elements are made anew at the end of the next step.
    run_dir = stop_in_batch(2, config)
    assert (run_dir / "checkpoint_8.json").exists()
    assert (run_dir / "checkpoint_12.json").exists()
    assert main([str(config), "--resume", str(run_dir)]) == 0
    assert_same_end(run_dir, whole)


def test_all_that_helps_is_at_work(aided_kind: str, whole: Path):
    assert_is_finite(whole)
    metrics = read_metrics(whole)
    dead = by_name(metrics, f"sparsity/train/dead_elements/{POSITION}")
    assert dead[0] > 0
    # All were made anew after 16 samples.
    assert dead[1] == 0
    for name in {"aux_k", "pre_act"} & AIDED[aided_kind].keys():
        # 0 where no element is dead.
        assert max(by_name(metrics, f"loss/train/{name}/{POSITION}")) > 0
    # Up in 16 samples, then down to a half at the end.
    assert by_name(metrics, "coeff/train/logits_kl") == [0.5, 1.0, 0.5]
    # Of 16 positions the first does not count, nor does any that is BOS.
    assert 0 < json.loads((whole / "eval.json").read_text())["n_tokens"] <= 4 * 15
    if AIDED[aided_kind].get("sparsity") is not None:
        coeffs = by_name(metrics, f"coeff/train/sparsity/{POSITION}")
        l0s = by_name(metrics, f"sparsity/train/L_0/{POSITION}")
        assert (coeffs[0] > 0.01) == (l0s[0] > 3.0)
        assert coeffs[0] != 0.01


def test_all_elements_may_be_made_anew_at_once(sae_settings: dict[str, Any], tmp_path: Path):
    content = content_of(sae_settings, "jumprelu", MIXES["e2e"])
    content["saes"]["initial_threshold"] = 100.0
    aids = {name: AIDS[name] for name in ("dead_elements", "resampling")}
    _, run_dir = train_saes({**content, **aids}, tmp_path)
    metrics = read_metrics(run_dir)
    # Equal inputs, such as those of equal tokens at the first position, serve one element each.
    before, after, *_ = by_name(metrics, f"sparsity/train/dead_elements/{POSITION}")
    assert before == 32
    assert after < before
    (saved,) = run_dir.glob("samples_*.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(saved).values())


def test_a_balanced_kl_finetunes_saes_of_a_saved_run(
    local_topk: Path, sae_settings: dict[str, Any], tmp_path: Path
):
    loss = {
        "logits_kl": {"coeff": 1.0, "balance_with": "out_to_in"},
        "out_to_in": {"coeff": 1.0},
    }
    content = content_of(sae_settings, "topk", loss)
    start = {"pretrained_sae_paths": [str(local_topk)], "retrain_saes": True}
    model, run_dir = train_saes({**content, "saes": {**content["saes"], **start}}, tmp_path)
    assert_loads_as_it_was_trained(model, run_dir)
    assert_is_finite(run_dir)
    before, after = (
        load_file(folder / "samples_24.safetensors") for folder in (local_topk, run_dir)
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    metrics = read_metrics(run_dir)
    # It starts where the other ended.
    ended = json.loads((local_topk / "eval.json").read_text())["metrics"]
    assert {name: metrics[0][name] for name in ended} == ended
    for line in metrics:
        if "loss" in line:
            error = line[f"loss/train/out_to_in/{POSITION}"]
            (balance,) = (value for name, value in line.items() if "balance" in name)
            assert balance * line["loss/train/logits_kl"] == pytest.approx(error, rel=1e-4)
    # The picture has one KL in training, and its balance elsewhere.
    panels = plots.collect_panels(run_dir / "metrics.jsonl")
    assert panels["logits_kl"].keys() == {("train", ""), ("eval", "")}


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_saes_that_are_not_retrained_stay_as_they_are(
    kind: str, sae_settings: dict[str, Any], tmp_path: Path
):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    content = content_of(sae_settings, kind, MIXES["e2e"])
    _, first = train_saes(content, tmp_path / "first")
    both = {
        "sae_positions": [POSITION, "blocks.2.hook_resid_pre"],
        "pretrained_sae_paths": [str(first)],
    }
    content = {**content, "saes": {**content["saes"], **both}}
    _, second = train_saes(content, tmp_path / "second")
    before, after = (load_file(folder / "samples_24.safetensors") for folder in (first, second))
    assert len(after) == 2 * len(before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("kind", ["jumprelu", "matryoshka"])
def test_a_dry_run_with_all_that_helps_finds_nothing_wrong(
    kind: str, sae_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    content = {**aided(sae_settings, kind), "save_dir": str(tmp_path / "out")}
    config = write_yaml(tmp_path / "config.yaml", content)
    assert main([str(config), "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("all is well, nothing was trained\n")
