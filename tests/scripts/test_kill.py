"""Runs of which nothing is left but what they had written."""

import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from sparsify.runs.checkpoints import MANIFEST_NAME, load_checkpoint
from sparsify.runs.weight_files import numbered_files
from sparsify.scripts.train_tlens_saes.sae_run import SAERun

from .conftest import assert_same_end, write_yaml

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.model]

N_KILLS, N_KILLS_PER_RUN = 20, 4
# Seconds behind the first checkpoint of a process.
LONGEST_DELAY = 0.6

# A server that has loaded everything and forks, so that a run begins at once.
CONTEXT = multiprocessing.get_context("forkserver")


def run_script(arguments: list[str], log: Path) -> None:
    import torch

    from sparsify.scripts.train_tlens_saes.run_train_tlens_saes import main

    torch.set_num_threads(2)  # other tests have one, whose sums are always in the same order
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(main(arguments))


class Run:
    """A run that is begun, and gone on with, in processes of its own."""

    def __init__(self, content: dict[str, Any], folder: Path) -> None:
        self.save_dir = folder / "out"
        self.log = folder / "log"
        folder.mkdir()
        self.config = write_yaml(
            folder / "config.yaml", {**content, "save_dir": str(self.save_dir)}
        )

    @property
    def run_dir(self) -> Path:
        (run_dir,) = self.save_dir.iterdir()
        return run_dir

    def finish(self) -> None:
        """Let it run to its end."""
        process = self._start()
        process.join()
        assert process.exitcode == 0, self.log.read_text()

    def kill(self, delay: float, writing: str | None) -> bool:
        """Let it run until it is killed; False if it came to its end before.

        That is so long after its first checkpoint and, unless None, while such a file is written.
        """
        n_before = self.newest()
        process = self._start()
        while self.newest() == n_before and process.is_alive():
            time.sleep(0.001)
        time.sleep(delay)
        while writing is not None and process.is_alive():
            if any(name.startswith(f".{writing}_") for name in os.listdir(self.run_dir)):
                break
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.log.read_text()
        return process.exitcode != 0

    def _start(self) -> BaseProcess:
        arguments = [str(self.config)]
        if self.save_dir.exists():
            arguments += ["--resume", str(self.run_dir)]
        process = CONTEXT.Process(target=run_script, args=(arguments, self.log))
        process.start()
        return process

    def newest(self) -> int:
        """Samples of the newest checkpoint."""
        if not self.save_dir.exists() or not any(self.save_dir.iterdir()):
            return 0
        return max(numbered_files(self.run_dir, MANIFEST_NAME).values(), default=0)


@pytest.fixture(scope="module")
def content(sae_settings: dict[str, Any]) -> dict[str, Any]:
    """Batches that are all saved, so that much of the time goes into writing."""
    return {
        **sae_settings,
        "n_samples": 600,
        "eval_every_n_samples": 200,
        "save_every_n_samples": 4,
        "saes": {**sae_settings["saes"], "dict_size_to_input_ratio": 64.0},
        "train_data": {**sae_settings["train_data"], "n_epochs": None},
    }


def test_killed_at_any_time_a_run_ends_as_if_it_had_not_been(
    content: dict[str, Any], tmp_path: Path
):
    CONTEXT.set_forkserver_preload([SAERun.__module__])
    whole = Run(content, tmp_path / "whole")
    whole.finish()
    rng = random.Random(0)
    n_kills = n_left_half_written = 0
    for index in range(N_KILLS):
        run = Run(content, tmp_path / f"{index}")
        for _ in range(N_KILLS_PER_RUN):
            writing = rng.choice([None, None, "samples", "state", "checkpoint"])
            n_kills += run.kill(rng.uniform(0, LONGEST_DELAY), writing)
            n_left_half_written += any(run.run_dir.glob(".*.tmp"))
            checkpoint = load_checkpoint(run.run_dir)
            assert (checkpoint.n_samples, checkpoint.damaged) == (run.newest(), [])
        run.finish()
        assert_same_end(run.run_dir, whole.run_dir)
        if n_kills >= N_KILLS:
            break
    assert n_kills >= N_KILLS
    assert n_left_half_written >= N_KILLS // 5
