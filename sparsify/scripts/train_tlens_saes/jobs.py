"""Several training runs, each in a process of its own: those that are not done yet.

A run is known by its config: a run folder that holds the same one, and a result, is not run again,
and one with a checkpoint goes on from it. So whatever ends a command, it can be repeated.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sparsify.base_config import UserError, dump_yaml, read_yaml, validate_config
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.training.interrupt import interrupt_says
from sparsify.training.run_folder import CONFIG_FILE, LOCK_FILE

PROGRAM = Path(__file__).with_name("run_train_tlens_saes.py")
RESULT_FILE = "eval.json"
POLL_SECONDS = 0.2
MAX_LABEL = 150


@dataclass(frozen=True)
class Job:
    """One run to be done."""

    label: str
    """What a person knows it by."""

    arguments: list[str]
    """Of `run_train_tlens_saes.py`."""

    config: Config
    """What they come to."""

    @property
    def key(self) -> str:
        """The same for equal configs."""
        return dump_yaml(self.config)


@dataclass
class KnownRuns:
    """Run folders by the config that they hold."""

    save_dirs: set[Path]
    folders: dict[str, list[Path]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for save_dir in self.save_dirs:
            for path in sorted(save_dir.glob(f"*/{CONFIG_FILE}")):
                try:
                    config = validate_config(Config, read_yaml(path), str(path))
                except UserError:
                    continue  # of another script, or of another version
                self.folders.setdefault(dump_yaml(config), []).append(path.parent)

    def finished(self, job: Job) -> Path | None:
        """The newest finished run of a job. None: there is none."""
        done = [run for run in self._runs(job) if (run / RESULT_FILE).exists()]
        return done[-1] if done else None

    def begun(self, job: Job) -> Path | None:
        """The newest run of a job that can go on from a checkpoint. None: there is none."""
        # They load torch, for which --help is not to wait.
        from sparsify.training.checkpoints import numbered_files
        from sparsify.training.resume import MANIFEST_NAME

        runs = [run for run in self._runs(job) if numbered_files(run, MANIFEST_NAME)]
        return runs[-1] if runs else None

    def _runs(self, job: Job) -> list[Path]:
        return self.folders.get(job.key, [])


def known_runs(jobs: Sequence[Job]) -> KnownRuns:
    """What is there of some jobs."""
    return KnownRuns({job.config.save_dir for job in jobs if job.config.save_dir is not None})


def do_jobs(jobs: Sequence[Job], n_processes: int | None) -> int:
    """Do what is not done yet of some jobs; returns the exit code: 1 if one failed.

    Their logs go to the folder `logs` beside the runs. Of all commands whose runs go to the same
    folder, one works at a time.

    Args:
        jobs: At least one. Equal ones are done once.
        n_processes: Runs at a time. None: one for each GPU, or one.

    Raises:
        UserError: A job would leave no result from which it could be told that it is done.
        KeyboardInterrupt: After all processes have saved and ended.
    """
    for job in jobs:
        check_leaves_result(job)
    assert jobs[0].config.save_dir is not None
    with interrupt_says("type the same command to go on"):
        failed = run_jobs(jobs, open_slots(n_processes), jobs[0].config.save_dir / "logs")
    for job in failed:
        print(f"failed: {job.label}", file=sys.stderr)
    return int(bool(failed))


def check_leaves_result(job: Job) -> None:
    """Raise a `UserError` if it could not be told that a job is done."""
    for name in ("save_dir", "eval_data"):
        if getattr(job.config, name) is None:
            raise UserError(
                f"{job.label}: {name} is null, so that nothing would tell when the run is done; "
                f"set {name}"
            )
    if job.config.resume is not None:
        raise UserError(f"{job.label}: resume is found for each run by itself; remove it")


def open_slots(n_processes: int | None) -> list[dict[str, str]]:
    """Variables of the environment of each process: its GPU, if there are any, and its threads.

    Args:
        n_processes: How many there are. None: one for each GPU, or one.
    """
    import torch

    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(index) for index in range(torch.cuda.device_count())]
    n_slots = n_processes or max(1, len(gpus))
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n_slots))}
    return [
        threads | ({"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {})
        for index in range(n_slots)
    ]


def add_processes_option(parser: argparse.ArgumentParser) -> None:
    """How many runs go on at a time."""

    def count(text: str) -> int:
        if (number := int(text)) < 1:
            raise ValueError
        return number

    help = "runs at a time (default: one for each GPU, or one)"
    parser.add_argument("--processes", type=count, metavar="N", help=help)


def run_jobs(jobs: Sequence[Job], slots: Sequence[Mapping[str, str]], folder: Path) -> list[Job]:
    """Do what is not done yet of some jobs, and say what happens.

    Args:
        jobs: What is to be done. Equal ones are done once.
        slots: Variables of the environment of each process, of which as many run at a time.
        folder: Where the logs go.

    Returns:
        The jobs that failed.

    Raises:
        KeyboardInterrupt: After all processes have saved and ended.
    """
    jobs = list({job.key: job for job in jobs}.values())
    free, failed, running = list(slots), [], []
    with sole_owner(folder) as lock:
        known = known_runs(jobs)
        waiting = deque(enumerate(jobs, start=1))
        try:
            while waiting or running:
                while waiting and free:
                    number, job = waiting.popleft()
                    name = f"[{number}/{len(jobs)}] {job.label}"
                    if (done := known.finished(job)) is not None:
                        print(f"{name}: done before, in {done}", flush=True)
                        continue
                    log = folder / f"{number:03d}_{_as_file_name(job.label)}.log"
                    running.append(_Run(name, job, free.pop(), known.begun(job), log, lock))
                time.sleep(POLL_SECONDS)
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    free.append(run.slot)
                    if not run.report():
                        failed.append(run.job)
        finally:
            for run in running:
                run.process.send_signal(signal.SIGINT)
            for run in running:
                run.process.wait()
    return failed


def _as_file_name(label: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", label)[:MAX_LABEL]


class _Run:
    """The process of a job."""

    def __init__(
        self,
        name: str,
        job: Job,
        slot: Mapping[str, str],
        begun: Path | None,
        log: Path,
        lock: int | None,
    ) -> None:
        self.name, self.job, self.slot, self.log = name, job, slot, log
        resume = [] if begun is None else ["--resume", str(begun)]
        command = [sys.executable, str(PROGRAM), *job.arguments, *resume]
        what = "begins" if begun is None else f"goes on in {begun}"
        print(f"{name}: {what}, log in {log}", flush=True)
        self.start = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            print(shlex.join(command), file=file, flush=True)
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **slot},
                pass_fds=() if lock is None else (lock,),
                # Ctrl-C reaches the processes from here alone, as a second one would not let them
                # save.
                start_new_session=True,
            )

    def report(self) -> bool:
        """Say how it ended; returns whether it did what it was to do."""
        minutes = (time.monotonic() - self.start) / 60
        if (code := self.process.returncode) == 0:
            print(f"{self.name}: done in {minutes:.1f} minutes", flush=True)
            return True
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")] or lines
        print(f"{self.name}: FAILED (exit code {code}): {errors[-1]}\n  log in {self.log}")
        sys.stdout.flush()
        return False


@contextmanager
def sole_owner(folder: Path) -> Iterator[int | None]:
    """Wait until no other command works on `folder`, nor a process that one left behind.

    Yields a file that keeps others waiting for as long as any process has it open. None: the system
    knows no such thing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        yield None
        return
    import fcntl

    # Of the open file, unlike the lock of a run folder: processes inherit it.
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting until other runs of '{folder}' have ended", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
