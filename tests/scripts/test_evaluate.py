import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.runs.config import SAERunConfig
from sparsify.runs.text import seen_in_training
from sparsify.scripts.evaluate import evaluate_runs
from sparsify.scripts.evaluate.run_evaluate import main

from .conftest import run_in_one_piece

POSITION = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="session")
def trained_run(sae_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = sae_settings | {"save_every_n_samples": 16}
    return run_in_one_piece(settings, tmp_path_factory.mktemp("evaluate"))


@pytest.fixture
def run_dir(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.model
def test_a_run_is_evaluated_as_its_config_says(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(run_dir)]) == 0
    content = json.loads((run_dir / "evaluation.json").read_text())
    in_training = json.loads((run_dir / "eval.json").read_text())
    assert content["checkpoint"] == "samples_24.safetensors"
    assert content["n_samples"] == in_training["n_samples"] == 8
    # The same batches, seed and checkpoint.
    assert content["metrics"].items() >= in_training["metrics"].items()
    assert set(content["metrics"]) - set(in_training["metrics"]) == {
        "performance/eval/random_error_kl",
        "performance/eval/error_kl_ratio",
        *(f"loss/eval/in_to_orig/blocks.2.hook_resid_{end}" for end in ("pre", "post")),
        "loss/eval/in_to_orig/explained_variance/blocks.2.hook_resid_pre",
        "loss/eval/in_to_orig/explained_variance/blocks.2.hook_resid_post",
        f"loss/eval/out_to_in/l2_ratio_first/{POSITION}",
        f"loss/eval/out_to_in/l2_ratio_rest/{POSITION}",
        f"dictionary/nearest_cosine/{POSITION}",
        f"dictionary/nearest_cosine_alive/{POSITION}",
    }
    assert set(content["histograms"]) == {
        f"{name}/{POSITION}" for name in ("log10_density", "nearest_cosine", "nearest_cosine_alive")
    }
    printed = capsys.readouterr().out
    assert "samples_24.safetensors" in printed
    assert "downstream at" in printed
    assert f"written to {run_dir / 'evaluation.json'}" in printed


@pytest.mark.slow
@pytest.mark.model
def test_checkpoints_are_evaluated_and_compared(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    permute(other / "samples_24.safetensors")
    checkpoint = run_dir / "samples_16.safetensors"
    path = tmp_path / "similarity.json"
    argv = [str(run_dir), str(checkpoint), str(other), "--n_samples", "4", "--compare", str(path)]
    assert main(argv) == 0
    assert json.loads((run_dir / "evaluation_16.json").read_text())["n_samples"] == 4
    whole = json.loads((run_dir / "evaluation.json").read_text())["metrics"]
    permuted = json.loads((other / "evaluation.json").read_text())["metrics"]
    assert whole["loss/eval/logits_kl"] == pytest.approx(permuted["loss/eval/logits_kl"], rel=1e-4)

    pairs = json.loads(path.read_text())
    newest = run_dir / "samples_24.safetensors"
    names = [str(newest), str(checkpoint), str(other / "samples_24.safetensors")]
    found = [(pair["a"], pair["b"], pair["position"]) for pair in pairs]
    assert found == [(names[a], names[b], POSITION) for a, b in ((0, 1), (0, 2), (1, 2))]
    # The permuted dictionary is the same.
    assert list(pairs[1]["metrics"].values()) == pytest.approx([1.0] * 6, abs=1e-4)
    assert pairs[0]["metrics"]["matched_cosine"] < 0.9999
    printed = re.sub(" +", " ", capsys.readouterr().out)
    assert f"{POSITION} 1 3 1.000 100.0 % 1.000" in printed


def with_settings(run: Path, *changes: tuple[str, str]) -> Path:
    """Change the config of a run, each where it stands first."""
    config = run / "final_config.yaml"
    text = config.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    config.write_text(text)
    return run


@pytest.mark.slow
@pytest.mark.model
def test_runs_of_other_seeds_are_evaluated_on_the_text_of_the_first(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    seeded = with_settings(
        Path(shutil.copytree(run_dir, tmp_path / "seeded")), ("\nseed: 0\n", "\nseed: 5\n")
    )
    shorter = with_settings(
        Path(shutil.copytree(run_dir, tmp_path / "shorter")),
        *[("n_ctx: 16", "n_ctx: 12")] * 2,  # of train_data and eval_data
    )
    assert main([str(run_dir), str(seeded), str(shorter)]) == 0
    found = [
        json.loads((run / "evaluation.json").read_text())["metrics"]["performance/eval/ce_loss_raw"]
        for run in (run_dir, seeded, shorter)
    ]
    assert found[1] == found[0] != found[2]
    out, err = capsys.readouterr()
    assert "its eval_data.n_ctx is 12, not 16; what depends on the text cannot be compared" in err
    table = out[out.index("side by side") :].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["1", "2", "3"]
    rows = [line.split() for line in table[6:9]]
    assert [row[:3] for row in rows] == [
        [str(place), POSITION, f"{ce:.4f}"] for place, ce in enumerate(found, start=1)
    ]


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({}, False),
        ({"split": "train"}, True),
        ({"split": "train", "subset": "other"}, False),
        ({"split": "train", "n_ctx": 8, "seed": 3}, True),
    ],
)
def test_text_that_is_trained_on_is_found(
    changes: dict[str, Any], is_same: bool, sae_settings: dict[str, Any]
):
    eval_data = {**sae_settings["train_data"], "split": "validation", **changes}
    config = SAERunConfig.model_validate(
        {name: value for name, value in sae_settings.items() if name in SAERunConfig.model_fields}
        | {"eval_data": eval_data, "train_data": {**sae_settings["train_data"], "split": "train"}}
    )
    assert (seen_in_training(config) is not None) == is_same


def permute(checkpoint: Path) -> None:
    """Put the elements of a checkpoint's SAE into another order."""
    weights = load_file(checkpoint)
    key = POSITION.replace(".", "-")
    n_dict = len(weights[f"{key}.encoder.0.bias"])
    order = torch.randperm(n_dict)
    for name, tensor in weights.items():
        if name.endswith("decoder.weight"):
            weights[name] = tensor[:, order].contiguous()
        elif len(tensor) == n_dict:
            weights[name] = tensor[order].contiguous()
    save_file(weights, checkpoint)


@pytest.mark.slow
@pytest.mark.model
def test_tokens_that_the_run_ignores_are_left_out(run_dir: Path):
    config = run_dir / "final_config.yaml"
    ignored = "ignored_tokens:\n  bos: true\n  first_n: 1\n"
    config.write_text(config.read_text().replace("ignored_tokens: null\n", ignored))
    assert main([str(run_dir), "--n_samples", "4"]) == 0
    content = json.loads((run_dir / "evaluation.json").read_text())
    assert 4 * 12 < content["n_tokens"] <= 4 * 15
    assert content["metrics"][f"loss/eval/out_to_in/l2_ratio_first/{POSITION}"] is None


@pytest.mark.slow
@pytest.mark.model
def test_ctrl_c_leaves_what_is_done_and_no_half_of_a_file(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    evaluate_checkpoint = evaluate_runs.evaluate_checkpoint

    def stop_at_other(target: evaluate_runs.EvaluationTarget) -> Any:
        if target.path.parent == other:
            raise KeyboardInterrupt
        return evaluate_checkpoint(target)

    monkeypatch.setattr(evaluate_runs, "evaluate_checkpoint", stop_at_other)
    before = {path.name for path in other.iterdir()}
    assert main([str(run_dir), str(other), "--n_samples", "4"]) == 130
    assert (run_dir / "evaluation.json").exists()
    assert {path.name for path in other.iterdir()} == before
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


# Bad input. Nothing may be written, nor evaluated, so an error of the last run is found first.


def assert_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "missing"], "missing: there is no such file or folder"),
        (["{run}", "{run}/../run"], "is given twice"),
        (["{run}/samples_24.safetensors", "{run}/samples_99.safetensors"], "no such file"),
        (["{run}", "{empty}"], "is not a run: there is no final_config.yaml in"),
        (["{run}/final_config.yaml"], "is not a checkpoint; give a samples_{N}.safetensors"),
        (["{run}/eval.json"], "eval.json: is not a checkpoint"),
        (["{run}", "n" * 300], "there is no such file or folder"),
        (["{run}", "--n_samples", "0"], "--n_samples: 0 is not a number of sequences"),
        (["{run}", "--n_samples", str(2**63)], "is not a number of sequences"),
        (["{run}", "{run}", "--compare", "n" * 300 + "/s.json"], "there is no folder"),
        (["{run}", "--compare", "{empty}/s.json"], "there is one run"),
        (["{run}", "{run}", "--compare", "{empty}"], "is not the name of a .json file"),
        (["{run}", "{run}", "--compare", "{empty}/no/s.json"], "there is no folder"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str],
    message: str,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "empty").mkdir()
    places = {"run": run_dir, "empty": tmp_path / "empty"}
    assert_refused([text.format(**places) for text in arguments], message, capsys)
    assert not list(run_dir.glob("evaluation*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"eval_data:\n(  .*\n)+", "eval_data: null\n", "has no eval_data"),
        (r"batch_size: 4", "batch_siz: 4", "unknown key 'batch_siz'; did you mean 'batch_size'?"),
        (r"\A", "- ", "is not valid YAML"),
    ],
)
def test_bad_configs_are_refused(
    old: str, new: str, message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    config = run_dir / "final_config.yaml"
    config.write_text(re.sub(old, new, config.read_text(), count=1))
    assert_refused([str(run_dir)], message, capsys)


@pytest.mark.slow
def test_a_run_without_a_checkpoint_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    for path in run_dir.glob("samples_*"):
        path.unlink()
    assert_refused([str(run_dir)], "holds no samples_{N}.safetensors", capsys)


@pytest.mark.slow
def test_a_run_of_a_language_model_is_refused(lm_run: Path, capsys: pytest.CaptureFixture[str]):
    assert_refused([str(lm_run)], "is not a valid config", capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tlens_model_processing: folded", "tlens_model_processing: raw", "SAEs of one model"),
        (None, None, "no two runs have an SAE at the same hook point"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    old: str | None,
    new: str,
    message: str,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    if old is None:
        checkpoint = other / "samples_24.safetensors"
        weights = load_file(checkpoint)
        moved = {name.replace("blocks-1", "blocks-2"): t for name, t in weights.items()}
        save_file(moved, checkpoint)
    else:
        config = other / "final_config.yaml"
        config.write_text(config.read_text().replace(old, new))
    argv = [str(run_dir), str(other), "--compare", str(tmp_path / "s.json")]
    assert_refused(argv, message, capsys)
    assert not (tmp_path / "s.json").exists()


def test_help_says_what_is_written(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "evaluation.json" in capsys.readouterr().out
