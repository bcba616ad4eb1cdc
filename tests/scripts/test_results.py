"""The comparison of mixes, and the page that holds it."""

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from sparsify.evaluation.frontier import Point, curves_of
from sparsify.runs.run_folder import write_config
from sparsify.scripts import tables
from sparsify.scripts.cli import EXIT_BAD_INPUT, training_scripts
from sparsify.scripts.results import claims, frontier, run_frontier, run_results
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.scripts.train_tlens_saes.run_train_tlens_saes import main as train
from sparsify.settings.base_config import BaseConfig, UserError
from sparsify.settings.command_line import load_config
from sparsify.sweeps.jobs import finished_runs
from sparsify.sweeps.sweep import load_sweep

from .conftest import write_yaml

LATER = "blocks.2.hook_resid_pre"
SCRIPTS = training_scripts().values()


def points(mix: str, factor: float) -> list[Point]:
    """Two seeds, of which the second needs twice the L0."""
    return [
        Point(mix, seed, coeff, l0=(1 + seed) * factor * l0, alive=100, ce_increase=ce, kl=ce)
        for seed in (0, 1)
        for coeff, l0, ce in ((2.0, 10.0, 0.4), (1.0, 40.0, 0.1))
    ]


def test_frontier_rows_hold_the_mean_l0_at_equal_ce_increase():
    found = curves_of([*points("local", 2.0), *points("e2e", 1.0)])
    rows = {row["at_ce_increase"]: row for row in frontier.frontier_rows(found)}
    assert list(rows) == [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4]
    # Half-way between the points in logarithms: 20 and 40 end to end, twice that locally.
    assert rows[0.2] == {
        "at_ce_increase": 0.2,
        "l0_local": pytest.approx(60),
        "l0_e2e": pytest.approx(30),
        "l0_e2e_local": None,
        "l0_e2e_downstream": None,
        "n_seeds": 2,
    }


def test_frontier_tables_compare_each_mix_to_the_first():
    lines = frontier.frontier_tables(curves_of([*points("e2e", 1.0), *points("local", 2.0)]))
    assert lines[0] == "| at CE increase | L0 local | L0 e2e | e2e ÷ local | seeds |"
    assert "| 0.2 | 60.0 ± 28.3 | 30.0 ± 14.1 | 0.500 ± 0.000 | 2 |" in lines
    # The CE increase is 4 / L0 end to end; of the second seed and locally twice that.
    assert "| 40 | 0.300 ± 0.141 | 0.150 ± 0.071 | 0.500 ± 0.000 | 2 |" in lines


def test_a_table_is_put_between_its_comments(tmp_path: Path):
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n")
    tables.put_into(document, "x", tables.markdown_table(["p", "q"], [["1", "2"]]))
    tables.put_into(document, "x", tables.markdown_table(["p", "q"], [["3", "4"]]))
    table = "| p | q |\n| --- | --- |\n| 3 | 4 |"
    assert document.read_text() == f"a\n<!-- begin x -->\n{table}\n<!-- end x -->\nb\n"
    with pytest.raises(UserError, match="has no '<!-- begin y -->' before"):
        tables.put_into(document, "y", [])


def test_recipes_of_results_are_valid():
    sweeps: dict[str, list[Any]] = {
        path.stem: load_sweep(path, SCRIPTS) for path in (run_results.FOLDER / "sweeps").glob("*")
    }
    assert set(sweeps) == {*run_results.FRONTIER, *run_results.LONG, *run_results.TOPK}
    (start, *_), (whole, *_) = sweeps["topk_nine_tenths"], sweeps["topk_local"]
    last = load_config(Config, [str(run_results.FINETUNE), "--saes.pretrained_sae_paths=[run]"], "")
    judged_on = [
        (job.config.eval_data, job.config.eval_n_samples) for job in chain(*sweeps.values())
    ]
    assert all(one == (last.eval_data, last.eval_n_samples) for one in judged_on)
    assert last.eval_data is not None
    assert last.eval_data.seed is not None  # the same text for all seeds
    assert start.config.n_samples + last.n_samples == whole.config.n_samples
    for mix in run_results.FRONTIER:
        assert {job.config.mix for job in sweeps[mix]} == {mix.replace("_", "-")}
        assert {job.config.n_samples for job in sweeps[mix]} == {8_000}
        assert {job.config.seed for job in sweeps[mix]} == {0, 1, 2}
    for name in run_results.LONG:
        assert {job.config.mix for job in sweeps[name]} == {name.removeprefix("long_")}
        assert {job.config.n_samples for job in sweeps[name]} == {24_000}


def write_sweep(folder: Path, name: str, recipe: dict[str, Any], **parameters: list[Any]) -> Path:
    path = write_yaml(folder / f"{name}_recipe.yaml", recipe)
    content = {
        "program": "run_train_tlens_saes.py",
        "method": "grid",
        "command": ["${program}", str(path), "${args}"],
        "parameters": {
            setting.replace("__", "."): {"values": values} for setting, values in parameters.items()
        },
    }
    (folder / "sweeps").mkdir(exist_ok=True)
    return write_yaml(folder / "sweeps" / f"{name}.yaml", content)


@pytest.fixture
def sweeps(sae_settings: dict[str, Any], tmp_path: Path) -> Path:
    """A folder with the sweeps and recipes of the page, a thousandth as large."""
    base = {**sae_settings, "save_dir": str(tmp_path / "out")}
    kl, later = {"coeff": 1.0}, {"hook_positions": [LATER], "total_coeff": 1.0}
    sparsity = {"coeff": 1.0}
    mixes = {
        "local": {"sparsity": sparsity, "out_to_in": kl},
        "e2e": {"sparsity": sparsity, "logits_kl": kl},
        "e2e_local": {"sparsity": sparsity, "logits_kl": kl, "out_to_in": kl},
        "e2e_downstream": {"sparsity": sparsity, "logits_kl": kl, "in_to_orig": later},
    }
    for name, loss in mixes.items():
        coeffs = [10.0, 0.01] if name == "local" else [0.1]
        grid = {"loss__sparsity__coeff": coeffs, "seed": [0, 1]}
        write_sweep(tmp_path, name, {**base, "loss": loss}, **grid)
    for name in ("local", "e2e"):
        longer = {**base, "loss": mixes[name], "n_samples": 32}
        write_sweep(tmp_path, f"long_{name}", longer, seed=[0])
    topk = {**base, "saes": {**base["saes"], "kind": "topk", "k": 3}}
    local, e2e = {"out_to_in": kl}, {"logits_kl": kl}
    write_sweep(tmp_path, "topk_local", {**topk, "loss": local}, saes__k=[2])
    write_sweep(tmp_path, "topk_e2e", {**topk, "loss": e2e}, saes__k=[2])
    start = {**topk, "loss": local, "n_samples": 16, "save_every_n_samples": 8}
    write_sweep(tmp_path, "topk_nine_tenths", start, saes__k=[2])
    (tmp_path / "recipes").mkdir()
    balanced = {"out_to_in": kl, "logits_kl": {"coeff": 1.0, "balance_with": "out_to_in"}}
    last = {**topk, "loss": balanced, "n_samples": 8}
    last["saes"] = {**last["saes"], "retrain_saes": True}
    write_yaml(tmp_path / "recipes" / "finetune.yaml", last)
    return tmp_path


@pytest.mark.slow
@pytest.mark.model
def test_the_page_of_results_is_made_of_runs(
    sweeps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for path in (sweeps / "sweeps").glob("*"):
        for job in load_sweep(path, SCRIPTS):
            assert train(job.arguments) == 0
    page = sweeps / "results.md"
    page.write_text((run_results.DOCS / "results.md").read_text())
    monkeypatch.setattr(run_results, "FOLDER", sweeps)
    monkeypatch.setattr(run_results, "FINETUNE", sweeps / "recipes" / "finetune.yaml")
    monkeypatch.setattr(run_results, "DOCUMENT", page)
    monkeypatch.setattr(run_results, "RESULTS", sweeps)
    capsys.readouterr()
    assert run_results.main([]) == 0
    said = capsys.readouterr().out
    assert said.count(": done before, in ") == 15  # all but the one that finetunes
    assert said.count("finetune saes.k=2 seed=100: ") == 2  # it begins, and it is done

    text = page.read_text()
    sections = {
        name: text.partition(f"<!-- begin {name} -->\n")[2].partition("\n<!-- end")[0].splitlines()
        for name in run_results.SECTIONS
    }
    assert [line.split(" | ")[0] for line in sections["same ce"][2:]] == [
        "| local", "| e2e", "| e2e-local", "| e2e-downstream",
    ]  # fmt: skip
    assert sections["downstream"][0] == f"| mix | {LATER} | blocks.2.hook_resid_post |"
    assert len(sections["geometry"]) == 2 + 4 + 6
    assert [line.split(" | ")[-1] for line in sections["geometry"][2:]] == [
        *4 * ["1 |"], *6 * ["2 |"],  # not those of one seed
    ]  # fmt: skip
    assert [line.split(" | ")[0] for line in sections["finetune"][2:]] == ["| 2"]
    assert sections["frontier"][0] == "10 of 10 runs."
    assert sections["long"][0] == "2 of 2 runs."
    found = json.loads((sweeps / "frontier_points.json").read_text())
    assert {point["mix"] for point in found} == set(frontier.MIXES)
    assert isinstance(json.loads((sweeps / "frontier.json").read_text()), list)
    for folder in (sweeps, sweeps / "long"):
        assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")

    # What is there is not made again, and the page stays as it is.
    assert run_results.main([]) == 0
    said = capsys.readouterr().out
    assert said.count(": done before, in ") == 16
    assert "Evaluated on" not in said
    assert page.read_text() == text


def fake_run(folder: Path, config: BaseConfig, name: str, **metrics: float | None) -> Path:
    """What a finished run leaves of what a frontier reads."""
    run = folder / name
    run.mkdir(parents=True)
    write_config(run, config)
    position = "blocks.1.hook_resid_pre"
    content = {
        "n_dict": {position: 8},
        "metrics": {
            f"sparsity/eval/L_0/{position}": metrics.get("l0", 3.0),
            f"sparsity/alive_dict_elements/{position}": 8.0,
            "performance/eval/ce_loss_increase": metrics.get("ce_increase", 0.1),
            "loss/eval/logits_kl": 0.1,
        },
    }
    (run / "eval.json").write_text(json.dumps(content))
    return run


def test_runs_that_are_not_alike_make_no_curve(
    sae_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base = {**sae_settings, "save_dir": str(tmp_path / "out")}
    grid = {"loss__sparsity__coeff": [1.0, 2.0], "lr": [0.01, 0.02]}
    jobs = load_sweep(write_sweep(tmp_path, "grid", base, **grid), SCRIPTS)
    runs = [
        fake_run(tmp_path / "out", jobs[0].config, "a", l0=0.0),
        fake_run(tmp_path / "out", jobs[2].config, "b", ce_increase=None),
    ]
    assert frontier.points_of(runs) == []
    assert capsys.readouterr().out.count("left out: ") == 2
    runs.append(fake_run(tmp_path / "out", jobs[1].config, "c"))
    with pytest.raises(UserError, match=r"is not of one curve with .*, as it has lr: 0.02 instead"):
        frontier.points_of(runs)


def test_kinds_have_curves_of_their_own(sae_settings: dict[str, Any], tmp_path: Path):
    base = {**sae_settings, "save_dir": str(tmp_path / "out"), "loss": {"logits_kl": {"coeff": 1}}}
    saes = {**base["saes"], "k": 3}
    jobs = [
        job
        for kind in ("topk", "batch_topk")
        for job in load_sweep(
            write_sweep(tmp_path, kind, {**base, "saes": {**saes, "kind": kind}}, saes__k=[2, 4]),
            SCRIPTS,
        )
    ]
    runs = [fake_run(tmp_path / "out", job.config, str(index)) for index, job in enumerate(jobs)]
    assert [(point.mix, point.coeff) for point in frontier.points_of(runs)] == [
        ("topk e2e", 2.0), ("topk e2e", 4.0), ("batch_topk e2e", 2.0), ("batch_topk e2e", 4.0),
    ]  # fmt: skip


def scaled(mix: str, seed: int, ce_increase: float, kl: float) -> list[Point]:
    """A curve of two points, of which the second has a third of the CE increase and KL."""
    return [
        Point(mix, seed, 2.0, l0=10.0, alive=100, ce_increase=ce_increase, kl=kl),
        Point(mix, seed, 1.0, l0=40.0, alive=100, ce_increase=ce_increase / 3, kl=kl / 3),
    ]


def test_levels_are_those_of_the_data():
    # CE increases of 0.88 to 2.64 and of 0.8 to 2.4.
    found = curves_of([*scaled("local", 0, 2.64, 0.03), *scaled("e2e", 0, 2.4, 0.024)])
    rows = frontier.frontier_rows(found)
    assert [row["at_ce_increase"] for row in rows] == [1.0, 1.5, 2.0]
    at_kl = [line for line in frontier.frontier_tables(found) if line.startswith("| 0.0")]
    assert [line.split(" | ")[0] for line in at_kl] == ["| 0.01", "| 0.015", "| 0.02"]


def test_curves_between_round_levels_are_compared_in_the_middle_of_what_they_share():
    # 0.52 to 0.58 and 0.54 to 0.595.
    found = curves_of(
        [
            Point(mix, 0, l0, l0=l0, alive=10, ce_increase=ce_increase, kl=ce_increase)
            for mix, ce_increases in (("local", (0.58, 0.52)), ("e2e", (0.595, 0.54)))
            for l0, ce_increase in zip((11.0, 14.0), ce_increases, strict=True)
        ]
    )
    (row,) = frontier.frontier_rows(found)
    assert row["at_ce_increase"] == pytest.approx(math.sqrt(0.54 * 0.58))
    assert any(line.startswith("| 0.5596 | ") for line in frontier.frontier_tables(found))


def test_mixes_without_a_common_seed_are_said_to_have_none():
    lines = frontier.frontier_tables(
        curves_of([*scaled("e2e", 1, 2.4, 0.3), *scaled("local", 7, 2.4, 0.3)])
    )
    why = "the mixes have no seed in common, so there is nothing to compare."
    assert f"L0 at equal KL: {why}" in lines
    assert "- e2e: seeds 1, KL 0.1 to 0.3" in lines


def test_mixes_that_meet_nowhere_are_said_to():
    lines = frontier.frontier_tables(
        curves_of([*scaled("e2e", 0, 2.4, 0.3), *scaled("local", 0, 2.4, 6.0)])
    )
    assert lines[0] == "| at CE increase | L0 local | L0 e2e | e2e ÷ local | seeds |"
    why = "of no seed the curves of all mixes have a KL in common, so there is nothing to compare."
    assert f"L0 at equal KL: {why}" in lines
    assert "- local: seeds 0, KL 2 to 6" in lines


@pytest.mark.slow
@pytest.mark.model
def test_a_frontier_is_that_of_finished_runs(sweeps: Path, capsys: pytest.CaptureFixture[str]):
    paths = [str(sweeps / "sweeps" / f"{name}.yaml") for name in ("local", "e2e")]
    arguments = [*paths, "--to", str(sweeps / "frontier")]
    assert run_frontier.main(arguments) == EXIT_BAD_INPUT
    assert "none of 6 runs is finished; do them with run_sweep.py" in capsys.readouterr().err
    jobs = load_sweep(Path(paths[0]), SCRIPTS)
    for job in jobs:
        assert train(job.arguments) == 0
    assert run_frontier.main(arguments) == 0
    assert "4 of 6 runs." in capsys.readouterr().out
    assert (sweeps / "frontier" / "frontier.json").exists()
    found = frontier.points_of(finished_runs(jobs))
    assert [(point.mix, point.coeff, point.seed) for point in found] == [
        ("local", 10.0, 0), ("local", 10.0, 1), ("local", 0.01, 0), ("local", 0.01, 1),
    ]  # fmt: skip
    assert all(math.isfinite(point.ce_increase) for point in found)
    assert claims.at_same_ce([]) == {}
    # The same of folders: of all runs, or of some.
    everything = str(sweeps / "out")
    assert run_frontier.main([everything, "--to", str(sweeps / "frontier")]) == 0
    assert "4 of 4 runs." in capsys.readouterr().out
    one, another = (str(run) for run in finished_runs(jobs)[:2])
    assert run_frontier.main([one, another, one, "--to", str(sweeps / "frontier")]) == 0
    assert "2 of 2 runs." in capsys.readouterr().out
    assert run_frontier.main([str(sweeps / "recipes")]) == EXIT_BAD_INPUT
    assert "is neither the folder of a finished run" in capsys.readouterr().err
