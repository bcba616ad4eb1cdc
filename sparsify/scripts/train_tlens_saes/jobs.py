"""Training runs that are to be done, and what is there of them.

A run is known by its config: a run folder that holds the same one, and a result, is not run again,
and one with a checkpoint goes on from it. So whatever ends a command, it can be repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsify.runs.run_folder import CONFIG_FILE, RESULT_FILE
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.settings.base_config import UserError, dump_yaml, read_yaml, validate_config


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
        from sparsify.runs.checkpoints import MANIFEST_NAME
        from sparsify.runs.weight_files import numbered_files

        runs = [run for run in self._runs(job) if numbered_files(run, MANIFEST_NAME)]
        return runs[-1] if runs else None

    def _runs(self, job: Job) -> list[Path]:
        return self.folders.get(job.key, [])


def known_runs(jobs: Sequence[Job]) -> KnownRuns:
    """What is there of some jobs."""
    return KnownRuns({job.config.save_dir for job in jobs if job.config.save_dir is not None})


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
