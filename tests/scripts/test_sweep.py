"""Grids of runs."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from sparsify.runs.run_folder import write_config
from sparsify.scripts.cli import EXIT_BAD_INPUT, EXIT_INTERRUPTED, training_scripts
from sparsify.scripts.sweep import run_sweep
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.settings.base_config import UserError, read_yaml
from sparsify.settings.command_line import load_config
from sparsify.sweeps import processes
from sparsify.sweeps.sweep import load_sweep

from .conftest import write_yaml

SCRIPTS = training_scripts().values()
COMMAND = ["${env}", "python", "${program}", "RECIPE", "${args}"]


def write_sweep(
    folder: Path, recipe: dict[str, Any], /, parameters: dict[str, Any], **changes: Any
) -> Path:
    path = write_yaml(folder / "recipe.yaml", {**recipe, "save_dir": str(folder / "out")})
    content = {
        "program": "scripts/run_train_tlens_saes.py",
        "method": "grid",
        "command": COMMAND,
        "parameters": parameters,
        **changes,
    }
    command = content.pop("command")
    if command is not None:
        content["command"] = [str(path) if part == "RECIPE" else part for part in command]
    return write_yaml(folder / "grid.yaml", content)


def write_short_sweep(folder: Path, recipe: dict[str, Any], **content: Any) -> Path:
    """Write a sweep file that is not one of W&B too."""
    path = write_yaml(folder / "recipe.yaml", {**recipe, "save_dir": str(folder / "out")})
    return write_yaml(folder / "short.yaml", {"recipe": str(path), **content})


@pytest.fixture
def recipe() -> dict[str, Any]:
    data = {"dataset_name": "python-stdlib", "n_ctx": 16}
    return {
        "tlens_model_name": "tiny-python",
        "n_samples": 8,
        "batch_size": 4,
        "lr": 1e-3,
        "loss": {"sparsity": {"coeff": 1.0}, "logits_kl": {"coeff": 1.0}},
        "saes": {"sae_positions": ["blocks.1.hook_resid_pre"], "dict_size_to_input_ratio": 2.0},
        "train_data": data,
        "eval_data": data,
    }


def test_a_sweep_is_all_combinations_of_its_values(recipe: dict[str, Any], tmp_path: Path):
    parameters = {
        "loss.sparsity.coeff": {"values": [0.5, 2]},
        "saes.sae_positions": {"value": "blocks.2.hook_resid_pre"},
        "seed": {"values": [0, 1, 2]},
    }
    found = load_sweep(write_sweep(tmp_path, recipe, parameters), SCRIPTS)
    configs: list[Any] = [job.config for job in found]  # of a script that a sweep file names
    assert [(config.loss.sparsity.coeff, config.seed) for config in configs] == [
        (0.5, 0), (0.5, 1), (0.5, 2), (2.0, 0), (2.0, 1), (2.0, 2),
    ]  # fmt: skip
    for config in configs:
        assert config.saes.sae_positions == ["blocks.2.hook_resid_pre"]
    assert found[1].label.startswith("grid loss.sparsity.coeff=0.5 ")


def test_wandb_gives_a_run_the_same_arguments(recipe: dict[str, Any], tmp_path: Path):
    settings = {
        "lr": 0.002,
        "loss.sparsity.coeff": 3,
        "compile": True,
        "lr_schedule": "constant",
        "saes.sae_positions": "blocks.2.hook_resid_pre",
    }
    sweep = write_sweep(
        tmp_path, recipe, {name: {"value": value} for name, value in settings.items()}
    )
    (job,) = load_sweep(sweep, SCRIPTS)
    content = read_yaml(sweep)
    given = create_sweep_command_args({"args": content["parameters"]})["args"]
    assert load_config(Config, [content["command"][3], *given], "") == job.config
    assert isinstance(job.config, Config)
    assert job.config.compile


def test_recipe_and_parameters_are_a_sweep(recipe: dict[str, Any], tmp_path: Path):
    parameters = {"loss.logits_kl": {"values": [None]}, "seed": {"values": [0, 1]}}
    jobs = load_sweep(write_short_sweep(tmp_path, recipe, parameters=parameters), SCRIPTS)
    assert [job.label for job in jobs] == ["short seed=0", "short seed=1"]
    for seed, job in enumerate(jobs):
        assert isinstance(job.config, Config)
        assert job.config.loss.logits_kl is None
        assert job.config.seed == seed


def test_named_runs_change_a_recipe_each_with_all_combinations(
    recipe: dict[str, Any], tmp_path: Path
):
    runs = {
        "e2e": None,
        "later": {"saes.sae_positions": ["blocks.2.hook_resid_pre"], "n_samples": 12},
        "local": {"loss": {"logits_kl": None, "out_to_in": {"coeff": 0.5}}},
    }
    parameters = {"seed": {"values": [0, 1]}, "lr": {"value": 0.5}}
    sweep = write_short_sweep(tmp_path, recipe, runs=runs, parameters=parameters)
    jobs = load_sweep(sweep, SCRIPTS)
    assert [job.label for job in jobs] == [
        f"short {name} seed={seed}" for name in runs for seed in (0, 1)
    ]
    configs = [job.config for job in jobs if isinstance(job.config, Config)]
    assert [config.mix for config in configs] == ["e2e"] * 4 + ["local"] * 2
    assert [config.n_samples for config in configs] == [8, 8, 12, 12, 8, 8]
    assert configs[3].saes.sae_positions == ["blocks.2.hook_resid_pre"]
    assert {config.lr for config in configs} == {0.5}


def test_nested_parameters_and_a_command_without_args_are_a_sweep(
    recipe: dict[str, Any], tmp_path: Path
):
    parameters = {
        "loss": {
            "parameters": {
                "sparsity": {"parameters": {"coeff": {"values": [0.5, 2.0]}}},
                "in_to_orig": {
                    "parameters": {
                        "hook_positions": {"values": [["blocks.2.hook_resid_pre"]]},
                        "total_coeff": {"values": [0.5]},
                    }
                },
                "out_to_orig": {"values": [None]},
            }
        }
    }
    sweep = write_sweep(tmp_path, recipe, parameters, command=["${program}", "RECIPE"])
    jobs = load_sweep(sweep, SCRIPTS)
    assert [job.label for job in jobs] == [
        "grid loss.sparsity.coeff=0.5",
        "grid loss.sparsity.coeff=2.0",
    ]
    config = jobs[1].config
    assert isinstance(config, Config)
    assert config.loss.sparsity is not None
    assert config.loss.sparsity.coeff == 2.0
    assert config.loss.in_to_orig is not None
    assert config.loss.in_to_orig.hook_positions == ["blocks.2.hook_resid_pre"]


def test_settings_of_the_command_line_are_those_of_all_runs(recipe: dict[str, Any], tmp_path: Path):
    command = ["${program}", "RECIPE", "--n_samples=16", "--saes.sae_positions=blocks.0", "${args}"]
    parameters = {"seed": {"values": [0, 1]}, "lr": {"value": 0.1}}
    sweep = write_sweep(tmp_path, recipe, parameters, command=command)
    overrides = ["--n_samples", "800", "--saes.sae_positions=blocks.2.hook_resid_pre", "--lr=0.2"]
    jobs = load_sweep(sweep, SCRIPTS, overrides)
    assert [job.label for job in jobs] == ["grid seed=0", "grid seed=1"]
    for job in jobs:
        assert isinstance(job.config, Config)
        assert job.config.n_samples == 800
        assert job.config.saes.sae_positions == ["blocks.2.hook_resid_pre"]
        assert job.config.lr == 0.2
        assert load_config(Config, job.arguments, "") == job.config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--n_sample", "8"],
            "grid seed=0: unknown option '--n_sample'; did you mean '--n_samples",
        ),
        (["--n_samples", "-8"], "n_samples: .*greater than 0"),
        (["--seed", "3"], "^--seed: differs between the runs of .*grid.yaml; change it there"),
        (["other.yaml"], "^'other.yaml': give settings as --NAME VALUE, after all other arg"),
    ],
)
def test_bad_setting_of_the_command_line_is_rejected(
    overrides: list[str], message: str, recipe: dict[str, Any], tmp_path: Path
):
    sweep = write_sweep(tmp_path, recipe, {"seed": {"values": [0, 1]}})
    with pytest.raises(UserError, match=message):
        load_sweep(sweep, SCRIPTS, overrides)


def test_a_setting_has_one_place(recipe: dict[str, Any], tmp_path: Path):
    runs = {"a": {"seed": 1}, "b": {}}
    sweep = write_short_sweep(tmp_path, recipe, runs=runs, parameters={"seed": {"value": 1}})
    with pytest.raises(UserError, match=r"runs.a: seed is in parameters too; remove one"):
        load_sweep(sweep, SCRIPTS)
    with pytest.raises(UserError, match="--seed: differs between the runs"):
        load_sweep(write_short_sweep(tmp_path, recipe, runs=runs), SCRIPTS, ["--seed=2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "bayes"}, "method: Input should be 'grid'"),
        ({"program": "train.py"}, r"program \(train.py\) must be the path of run_train_tlens_saes"),
        ({"command": ["${program}", "${args}"]}, "must name a recipe and pass on"),
        ({"command": ["${program}", "${args}", "RECIPE"]}, "must name a recipe and pass on"),
        ({"recipe": "a.yaml"}, "give either recipe, or command with the recipe in it"),
        ({"command": None}, "give either recipe, or command with the recipe in it"),
        ({"parameters": {}}, "give parameters or runs, in which the runs differ"),
        ({"runs": {"a": {}}}, "runs do not go with command; name the recipe in recipe instead"),
        ({"command": None, "recipe": "no.yaml"}, "recipe: there is no recipe 'no.yaml' in '/"),
        ({"parameters": {"lr": {"value": {"a": 1}}}}, "give the settings inside by their dotted"),
        ({"parameters": {"lr": {"value": None}}}, "in command, as in --max_grad_norm=null"),
        ({"parameters": {"lr": {"values": [[1]]}}}, r"\[1\] is not passed on as it is"),
        ({"parameters": {"lr": {"values": []}}}, "give either value, or values with at least one"),
        ({"parameters": {"lr": {"min": 0.1}}}, r"unknown key 'min'"),
        ({"parameters": {"l": {"value": 1}}}, "grid: unknown option '--l'; did you mean '--lr"),
        ({"parameters": {"lr": {"values": [1, -1]}}}, r"grid lr=-1: .*\n  lr: .*greater than 0"),
        ({"command": ["${program}", "no.yaml", "${args}"]}, "there is no recipe 'no.yaml' in '/"),
    ],
)
def test_bad_sweep_is_rejected(
    changes: dict[str, Any], message: str, recipe: dict[str, Any], tmp_path: Path
):
    sweep = write_sweep(tmp_path, recipe, **{"parameters": {"seed": {"value": 1}}, **changes})
    with pytest.raises(UserError, match=message):
        load_sweep(sweep, SCRIPTS)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--eval_data=null", "eval_data is null, so that nothing would tell when the run is done"),
        ("--save_dir=null", "save_dir is null"),
        ("--resume=somewhere", "resume is found for each run by itself; remove it"),
    ],
)
def test_a_sweep_needs_results_to_know_runs_by(
    argument: str,
    message: str,
    recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    command = ["${program}", "RECIPE", argument, "${args}"]
    sweep = write_sweep(tmp_path, recipe, {"seed": {"value": 1}}, command=command)
    assert run_sweep.main([str(sweep)]) == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_each_process_has_a_gpu_and_its_share_of_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert processes.open_slots(None) == [
        {"OMP_NUM_THREADS": "6", "CUDA_VISIBLE_DEVICES": "2"},
        {"OMP_NUM_THREADS": "6", "CUDA_VISIBLE_DEVICES": "5"},
    ]
    shared = [slot["CUDA_VISIBLE_DEVICES"] for slot in processes.open_slots(3)]
    assert shared == ["2", "5", "2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [slot["OMP_NUM_THREADS"] for slot in processes.open_slots(2)] == ["1", "1"]


class Sweep:
    """A sweep in a process of its own."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, run_sweep.__file__, str(path), "--processes", "2"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.lines: list[str] = []

    def count(self, what: str) -> int:
        return sum(what in line for line in self.lines)

    def read(self, what: str | None = None) -> None:
        """Read what it says, until it says `what`, or to its end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if what is not None and what in line:
                return
        self.process.stdout.close()


@pytest.mark.slow
@pytest.mark.fault
def test_a_sweep_that_is_killed_goes_on_and_does_each_run_once(
    sae_settings: dict[str, Any], tmp_path: Path
):
    data = {**sae_settings["train_data"], "n_epochs": None}
    recipe = {**sae_settings, "n_samples": 800, "save_every_n_samples": 80, "train_data": data}
    grid = {"loss.sparsity.coeff": {"values": [0.01, 0.1, 1]}, "seed": {"values": [0, 1]}}
    path = write_sweep(tmp_path, recipe, grid)

    first = Sweep(path)
    first.read(": done in ")
    while not list((tmp_path / "out").glob("*/checkpoint_*.json")):
        time.sleep(0.05)
    first.process.terminate()
    first.read()
    assert first.process.wait() == EXIT_INTERRUPTED, first.lines

    second = Sweep(path)
    second.read(": done in ")
    second.process.send_signal(signal.SIGKILL)  # which leaves the runs that it began
    second.read()
    second.process.wait()

    third = Sweep(path)
    third.read()
    assert third.process.wait() == 0, third.lines
    assert third.count(": done before, in ") + third.count(": done in ") == 6
    assert third.count(": done before, in ") >= 2
    results = list((tmp_path / "out").glob("*/eval.json"))
    configs = {(result.parent / "final_config.yaml").read_text() for result in results}
    assert len(results) == len(configs) == 6


def test_a_sweep_waits_for_runs_that_a_killed_one_left_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    script = f"""
import os, signal, subprocess, sys
from pathlib import Path
from sparsify.sweeps.processes import sole_owner
with sole_owner([Path({str(tmp_path / "logs")!r})]) as locks:
    subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=locks, start_new_session=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    left = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True)
    assert left.wait() == -signal.SIGKILL
    assert left.stdin is not None
    end = threading.Timer(0.3, left.stdin.close)  # at which what is left ends
    end.start()
    with processes.sole_owner([tmp_path / "logs"]):
        assert end.finished.is_set()
    assert capsys.readouterr().out == f"waiting until other runs of '{tmp_path}' have ended\n"


@pytest.mark.slow
def test_other_runs_go_on_when_one_fails(
    sae_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    positions = {"values": ["blocks.7.hook_resid_pre", "blocks.2.hook_resid_pre"]}
    path = write_sweep(tmp_path, sae_settings, {"saes.sae_positions": positions})
    assert run_sweep.main([str(path)]) == 1
    said = capsys.readouterr()
    assert "[1/2] grid saes.sae_positions=blocks.7.hook_resid_pre: FAILED (exit code 2): " in (
        said.out
    )
    assert "error: saes.sae_positions: the model has no hook point 'blocks.7." in said.out
    assert "[2/2] grid" in said.out
    assert ": done in " in said.out
    assert said.err == "failed: grid saes.sae_positions=blocks.7.hook_resid_pre\n"
    (result,) = (tmp_path / "out").glob("*/eval.json")
    metrics = json.loads(result.read_text())["metrics"]
    table = said.out.splitlines()[-3:]
    assert table[0].split() == ["run", "L0", "CE", "increase", "KL", "minutes"]
    assert table[1].split()[2:] == ["-", "-", "-", "-"]
    assert table[2].split()[2:5] == [
        f"{metrics['sparsity/eval/L_0/blocks.2.hook_resid_pre']:.1f}",
        f"{metrics['performance/eval/ce_loss_increase']:.4f}",
        f"{metrics['loss/eval/logits_kl']:.4f}",
    ]
    assert float(table[2].split()[5]) < 10

    seeds = {"saes.sae_positions": {"values": ["blocks.2.hook_resid_pre"]}}
    again = write_sweep(tmp_path, sae_settings, seeds)
    assert run_sweep.main([str(again)]) == 0  # done before: its row lacks the minutes alone
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["grid", *table[2].split()[2:5], "-"]


def test_the_table_shows_settings_that_the_command_line_gave(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sweep = write_short_sweep(tmp_path, recipe, parameters={"seed": {"values": [0, 1]}})
    jobs = load_sweep(sweep, SCRIPTS, ["--n_samples", "400"])
    for job in jobs:  # done before
        run_dir = tmp_path / "out" / f"run_{job.config.seed}"
        run_dir.mkdir(parents=True)
        write_config(run_dir, job.config)
        metrics = {
            "sparsity/eval/L_0/blocks.1.hook_resid_pre": 10.0,
            "sparsity/eval/L_0/blocks.2.hook_resid_pre": 30.0,
            "performance/eval/ce_loss_increase": job.config.seed + 0.25,
            "loss/eval/logits_kl": None,
        }
        (run_dir / "eval.json").write_text(json.dumps({"metrics": metrics}))
    assert run_sweep.main([str(sweep), "--n_samples", "400", "--processes", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "run             L0  CE increase  KL  minutes",
        "short seed=0  20.0       0.2500   -        -",
        "short seed=1  20.0       1.2500   -        -",
    ]


def test_zero_processes_are_refused(capsys: pytest.CaptureFixture[str]):
    assert run_sweep.main(["sweep.yaml", "--processes", "0"]) == 2
    assert "'0' is not a number of processes; give 1 or more" in capsys.readouterr().err
