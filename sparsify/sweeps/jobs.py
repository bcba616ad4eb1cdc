"""Training runs that are to be done, and their run folders so far.

A job is known by its config: where a run folder holds the same one and a result, the job is done,
and where it holds a checkpoint, the run is resumed. So whatever ends a command, it can be repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsify.runs.run_folder import CONFIG_FILE, RESULT_FILE
from sparsify.settings.base_config import UserError, dump_yaml, read_yaml, validate_config
from sparsify.training.config import TrainingConfig


@dataclass(frozen=True)
class Script:
    """A script that trains."""

    program: Path
    """File of the script."""

    config: type[TrainingConfig]
    """The settings that it takes."""


@dataclass(frozen=True)
class Job:
    """One run to be done."""

    label: str
    """Name for people."""

    script: Script
    """The script that does it."""

    arguments: list[str]
    """Command line of the script, without its name."""

    config: TrainingConfig
    """The settings that the arguments give."""

    @property
    def key(self) -> str:
        """A text that is the same for equal configs."""
        return dump_yaml(self.config.with_absolute_paths())


@dataclass
class KnownRuns:
    """Run folders by the config in them."""

    places: set[tuple[Path, type[TrainingConfig]]]
    """Folders of runs, and the settings of the script that made them."""

    folders: dict[str, list[Path]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for save_dir, config_class in self.places:
            for path in sorted(save_dir.glob(f"*/{CONFIG_FILE}")):
                try:
                    config = validate_config(config_class, read_yaml(path), str(path))
                except UserError:
                    continue  # of another script, or of another version
                key = dump_yaml(config.with_absolute_paths())
                self.folders.setdefault(key, []).append(path.parent)

    def finished(self, job: Job) -> Path | None:
        """Return the newest finished run of a job. None: there is none."""
        done = [run for run in self._runs(job) if (run / RESULT_FILE).exists()]
        return done[-1] if done else None

    def begun(self, job: Job) -> Path | None:
        """Return the newest run of a job that can be resumed. None: there is none."""
        # They load torch, for which --help is not to wait.
        from sparsify.runs.checkpoints import MANIFEST_NAME
        from sparsify.runs.weight_files import numbered_files

        runs = [run for run in self._runs(job) if numbered_files(run, MANIFEST_NAME)]
        return runs[-1] if runs else None

    def _runs(self, job: Job) -> list[Path]:
        return self.folders.get(job.key, [])


def known_runs(jobs: Sequence[Job]) -> KnownRuns:
    """Return the run folders that could be those of some jobs."""
    return KnownRuns(
        {(job.config.save_dir, job.script.config) for job in jobs if job.config.save_dir}
    )


def finished_runs(jobs: Sequence[Job]) -> list[Path]:
    """Return the newest finished run of each job that has one, in the order of the jobs."""
    known = known_runs(jobs)
    return [run for job in jobs if (run := known.finished(job)) is not None]


def check_leaves_result(job: Job) -> None:
    """Raise a `UserError` if it could not be told that a job is done."""
    for name in ("save_dir", "eval_data"):
        if getattr(job.config, name, None) is None:
            raise UserError(
                f"{job.label}: {name} is null, so that nothing would tell when the run is done; "
                f"set {name}"
            )
    if job.config.resume is not None:
        raise UserError(f"{job.label}: resume is found for each run by itself; remove it")
