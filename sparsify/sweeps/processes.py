"""Several training runs at a time, each in a process of its own."""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sparsify.runs.interrupt import held_interrupt
from sparsify.runs.run_folder import LOCK_FILE
from sparsify.settings.terminal import printable, report, tell
from sparsify.sweeps.jobs import Job, check_leaves_result, known_runs
from sparsify.sweeps.table import results_table

POLL_SECONDS = 0.2
MAX_LABEL = 150


@dataclass
class Outcome:
    """The end of the jobs that a command has worked on."""

    failed: list[Job] = field(default_factory=list)
    minutes: dict[str, float] = field(default_factory=dict)
    """Duration of each run that was trained from start to end, by the key of its job."""


def do_jobs(jobs: Sequence[Job], n_processes: int | None, *, has_table: bool = False) -> int:
    """Do those of some jobs that are not done yet; returns the exit code: 1 if one failed.

    Their logs go to the folder `logs` beside the runs. Of all such commands whose runs go to the
    same folder, one works at a time.

    Args:
        jobs: At least one. Equal ones are done once.
        n_processes: Runs at a time. None: one for each GPU, or one.
        has_table: Whether to print a table of all results at the end.

    Raises:
        UserError: A job would leave no result from which it could be told that it is done.
        KeyboardInterrupt: After all processes have saved and ended.
    """
    for job in jobs:
        check_leaves_result(job)
    outcome = run_jobs(jobs, open_slots(n_processes))
    if has_table:
        report("\n".join(["", *results_table(jobs, outcome.minutes)]))
    for job in outcome.failed:
        tell(f"failed: {job.label}")
    return int(bool(outcome.failed))


def add_processes_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the number of runs at a time."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a number of processes; give 1 or more"
            )
        return int(text)

    help = "runs at a time (default: one for each GPU, or one)"
    parser.add_argument("--processes", type=count, metavar="N", help=help)


def open_slots(n_processes: int | None) -> list[dict[str, str]]:
    """Return environment variables for each process: its GPU, if there are any, and its threads.

    Args:
        n_processes: Number of processes. None: one for each GPU, or one.
    """
    import torch

    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(index) for index in range(torch.cuda.device_count())]
    n_slots = n_processes or max(1, len(gpus))
    n_threads = max(1, _n_cores() // n_slots)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(n_threads))}
    return [
        threads | ({"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {})
        for index in range(n_slots)
    ]


def _n_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(jobs: Sequence[Job], slots: Sequence[Mapping[str, str]]) -> Outcome:
    """Do those of some jobs that are not done yet, and print what happens.

    Args:
        jobs: Runs to be done. Equal ones are done once.
        slots: Environment variables of each process, of which as many run at a time.

    Raises:
        KeyboardInterrupt: After all processes have saved and ended, or at once for a second one.
    """
    jobs = list({job.key: job for job in jobs}.values())
    free, running, outcome = list(slots), [], Outcome()
    with (
        sole_owner({logs_of(job) for job in jobs}) as locks,
        held_interrupt("to resume, type the same command") as is_interrupted,
    ):
        waiting = deque(_to_do(jobs))
        try:
            while running or (waiting and not is_interrupted()):
                while waiting and free and not is_interrupted():
                    running.append(_Run(*waiting.popleft(), free.pop(), locks))
                if is_interrupted():
                    _stop(running)
                time.sleep(POLL_SECONDS)
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    free.append(run.slot)
                    if not run.report():
                        outcome.failed.append(run.job)
                    elif run.begun is None:
                        outcome.minutes[run.job.key] = run.minutes
        finally:
            _stop(running)
    return outcome


def logs_of(job: Job) -> Path:
    """Return the folder of the logs of a job's process."""
    assert job.config.save_dir is not None
    return job.config.save_dir / "logs"


def _to_do(jobs: Sequence[Job]) -> Iterator[tuple[str, Job, Path | None]]:
    """Yield each job that is not done, with a name and the run to resume if there is one."""
    known = known_runs(jobs)
    for number, job in enumerate(jobs, start=1):
        name = f"[{number}/{len(jobs)}] {job.label}"
        if (done := known.finished(job)) is not None:
            report(f"{name}: done before, in {done}")
        else:
            yield name, job, known.begun(job)


class _Run:
    """The process of a job."""

    def __init__(
        self,
        name: str,
        job: Job,
        begun: Path | None,
        slot: Mapping[str, str],
        locks: Sequence[int],
    ) -> None:
        self.name, self.job, self.begun, self.slot = name, job, begun, slot
        file_name = re.sub(r"[^\w.=-]+", "_", job.label)[:MAX_LABEL]
        self.log = logs_of(job) / f"{file_name}.log"
        resume = [] if begun is None else ["--resume", str(begun)]
        command = [sys.executable, str(job.script.program), *job.arguments, *resume]
        what = "begins" if begun is None else f"resumes {begun}"
        report(f"{name}: {what}, log in {self.log}")
        self.is_stopped = False
        self.start, self.minutes = time.monotonic(), 0.0
        with self.log.open("ab", buffering=0) as file:
            self.log_start = file.tell()
            with suppress(OSError):  # a full disk, which the run itself survives
                file.write(f"{printable(shlex.join(command))}\n".encode())
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **slot},
                pass_fds=locks,
                # Ctrl-C reaches the processes from here alone: a second one would keep them from
                # saving.
                start_new_session=True,
            )

    def report(self) -> bool:
        """Print how it ended; returns whether the run is done."""
        self.minutes = (time.monotonic() - self.start) / 60
        if (code := self.process.returncode) == 0:
            report(f"{self.name}: done in {self.minutes:.1f} minutes")
            return True
        if self.is_stopped:
            report(f"{self.name}: stopped")
            return False
        with self.log.open(encoding="utf-8", errors="replace") as file:
            file.seek(self.log_start)
            lines = file.read().splitlines()
        errors = [line for line in lines if line.startswith("error: ")] or lines
        last = errors[-1] if errors else "it said nothing"
        report(f"{self.name}: FAILED (exit code {code}): {last}\n  log in {self.log}")
        if self.begun is not None:
            report(f"  it is resumed the next time; to start from scratch, move {self.begun} away")
        return False


def _stop(running: Sequence[_Run]) -> None:
    """Have each process save and end."""
    for run in running:
        if not run.is_stopped:
            run.is_stopped = True
            # Not SIGINT, which processes in a shell's background ignore.
            run.process.terminate()


@contextmanager
def sole_owner(folders: Iterable[Path]) -> Iterator[list[int]]:
    """Wait until no other command works on the folders, nor a process that one left behind.

    Yields files that keep others waiting for as long as any process has them open, where the system
    knows such a thing.
    """
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        yield []
        return
    import fcntl

    with ExitStack() as opened:
        files = []
        for folder in sorted(folders):  # the same order for all, so that no two wait in a ring
            # Of the open file, unlike the lock of a run folder: processes inherit it.
            files.append(opened.enter_context((folder / LOCK_FILE).open("w")).fileno())
            try:
                fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(f"waiting until other runs of '{folder.parent}' have ended")
                fcntl.flock(files[-1], fcntl.LOCK_EX)
        yield files
