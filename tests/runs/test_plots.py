import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from sparsify.runs.plots import collect_panels, plot_training

METRICS: Sequence[Mapping[str, float | None]] = (
    {
        "n_samples": 0,
        "loss": 9.0,
        "loss/train/sparsity/blocks.10.hook_resid_pre": 4.0,
        "loss/train/sparsity/blocks.2.hook_resid_pre": 3.0,
        "loss/train/out_to_in/explained_variance/blocks.2.hook_resid_pre": 0.5,
        "loss/train/my_term/blocks.2.hook_resid_pre": 0.7,
        "sparsity/train/L_0/blocks.2.hook_resid_pre": 90.0,
        "lr": 1e-3,
    },
    {"n_samples": 0, "performance/eval/ce_loss_increase": 5.0, "loss/eval/logits_kl": None},
    {"n_samples": 8, "performance/eval/ce_loss_increase": 0.3, "loss/eval/logits_kl": 0.2},
    {"n_samples": 8, "performance/eval/ce_loss_increase": 0.4},
)


def _write(run_dir: Path, metrics: Sequence[Mapping[str, float | None]]) -> Path:
    path = run_dir / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in metrics))
    return path


def test_metrics_are_sorted_into_panels(tmp_path: Path):
    panels = collect_panels(_write(tmp_path, METRICS))
    assert list(panels) == ["loss", "sparsity", "logits_kl", "L_0", "ce_loss_increase", "my_term"]
    assert panels["sparsity"] == {
        ("train", "blocks.2.hook_resid_pre"): {0: 3.0},
        ("train", "blocks.10.hook_resid_pre"): {0: 4.0},
    }
    assert next(iter(panels["sparsity"])) == ("train", "blocks.2.hook_resid_pre")
    assert panels["logits_kl"] == {("eval", ""): {8: 0.2}}
    assert panels["ce_loss_increase"] == {("eval", ""): {0: 5.0, 8: 0.4}}


def test_picture_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    _write(tmp_path, METRICS)
    path = plot_training(tmp_path)
    assert path == tmp_path / "training.png"
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _write(tmp_path, METRICS)
    monkeypatch.setattr("sparsify.runs.plots.find_spec", lambda _: None)
    assert plot_training(tmp_path) is None
    assert not (tmp_path / "training.png").exists()


def test_run_without_metrics_has_no_picture(tmp_path: Path):
    _write(tmp_path, [])
    assert plot_training(tmp_path) is None


def test_one_logged_step_can_be_seen(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    _write(tmp_path, [{"n_samples": 8, "loss/train/my_term/blocks.2.hook_resid_pre": 1.0}])
    assert plot_training(tmp_path)
    picture = imread(tmp_path / "training.png")
    panel = picture[: int(0.75 * len(picture))]  # the legend stands below
    is_blue = panel[..., 2] > panel[..., 0] + 0.2
    assert is_blue.any()


def test_language_model_has_its_own_panels(tmp_path: Path):
    metrics = [
        {"n_samples": 8, "loss": 4.0, "lr": 0.1},
        {"n_samples": 8, "performance/eval/ce_loss": 4.5, "performance/eval/bits_per_byte": 2.0},
        {"n_samples": 16, "loss": 3.0, "lr": 0.2},
    ]
    assert collect_panels(_write(tmp_path, metrics)) == {
        "ce_loss": {("eval", ""): {8: 4.5}, ("train", ""): {8: 4.0, 16: 3.0}},
        "bits_per_byte": {("eval", ""): {8: 2.0}},
        "lr": {("train", ""): {8: 0.1, 16: 0.2}},
    }


def test_damaged_lines_and_names_that_are_none_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = _write(tmp_path, METRICS)
    expected = collect_panels(path)
    odd = {"n_samples": 8, "loss/train/$\\frac{$": 1, "loss/train/a/²": 1, "loss/train/x/\0": 1}
    lines = [b"\xff\x00{", json.dumps(odd).encode(), b"[1]", b'{"n_samples": 8, "loss": 1e999}']
    path.write_bytes(b"\n".join([*lines, path.read_bytes()]) + b'{"n_sam')
    assert collect_panels(path) == expected
    assert capsys.readouterr().err == f"warning: {path}: 4 damaged lines are left out\n"


def test_a_file_of_many_names_has_a_picture_of_few(tmp_path: Path):
    names = {f"loss/train/term_{index}": 1.0 for index in range(10_000)}
    assert len(collect_panels(_write(tmp_path, [{"n_samples": 0, **names}]))) == 40
