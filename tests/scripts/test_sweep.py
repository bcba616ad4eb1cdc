"""Grids of runs."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

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
    folder: Path, recipe: dict[str, Any], parameters: dict[str, Any], **changes: Any
) -> Path:
    path = write_yaml(folder / "recipe.yaml", {**recipe, "save_dir": str(folder / "out")})
    content = {
        "program": "scripts/run_train_tlens_saes.py",
        "method": "grid",
        "command": COMMAND,
        "parameters": parameters,
        **changes,
    }
    content["command"] = [str(path) if part == "RECIPE" else part for part in content["command"]]
    return write_yaml(folder / "grid.yaml", content)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "bayes"}, "method: Input should be 'grid'"),
        ({"program": "train.py"}, r"program \(train.py\) must be the path of run_train_tlens_saes"),
        ({"command": ["${program}", "${args}"]}, "must name a recipe and hand on"),
        ({"command": ["${program}", "RECIPE.yaml"]}, "must name a recipe and hand on"),
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
    assert len(list((tmp_path / "out").glob("*/eval.json"))) == 1


def test_zero_processes_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run_sweep.main(["sweep.yaml", "--processes", "0"])
    assert "'0' is no number of processes; give 1 or more" in capsys.readouterr().err
