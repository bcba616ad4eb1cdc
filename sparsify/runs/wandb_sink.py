"""The sink that reports to Weights & Biases, and that a run can do without.

Training does not depend on a service: if it cannot be reached, or fails in the middle, training
continues, numbers and weights are in the run folder, and one warning says so. Only what a person
must fix, and can at once, is an error at the start.
"""

import configparser
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.runs.console import say
from sparsify.runs.run_folder import CONFIG_FILE, replace_atomically
from sparsify.runs.sink import Sink
from sparsify.settings.base_config import UserError
from sparsify.settings.files import open_regular, read_text
from sparsify.settings.secrets import REDACTED, one_line, secrets_of_environment
from sparsify.training.config import TrainingConfig

if TYPE_CHECKING:
    from wandb import Run

# Seconds for wandb to start a run, and to send what is left when it ends. Its defaults are 90 and
# no limit, in which a GPU would wait for a service that is down. WANDB_INIT_TIMEOUT and
# WANDB_FINISH_TIMEOUT take precedence.
TIMEOUTS_S = {"init_timeout": 60.0, "finish_timeout": 600.0}

MAX_LOG_BYTES = 200_000_000
"""More than a log of wandb has."""

SILENT_MODES = ("offline", "dryrun", "disabled")
"""Values of WANDB_MODE with which nothing is sent."""

HARMLESS_SETTINGS = {"entity", "project", "mode", "disabled", "ignore_globs", "save_code"}
"""Settings that a file of the working directory may make; `wandb init` writes the first two."""

# wandb raises the same class for a service that did not answer and for one that refused; the
# message of the latter is the service's own.
_NO_ANSWER = re.compile(
    r"time[ds]?[ -]?out|deadline|connection|connect:|dial tcp|no such host|unreachable|\bEOF\b"
    r"|(HTTP|status|code)\W*(5\d\d|429)",
    re.IGNORECASE,
)


class WandbSink(Sink):
    """A run of Weights & Biases, its steps counted in samples.

    The account is read from the environment, to which scripts add what `.env` says:
    `WANDB_API_KEY`, `WANDB_ENTITY`; `WANDB_MODE=offline` keeps the run on disk. So does a service
    that cannot be reached. Texts for the console are not sent: wandb itself copies what the
    terminal shows. After an error of wandb the sink does nothing.

    Args:
        config: What the run was started with; `wandb_project` is set.
        run_name: Name shown for the run.
        run_dir: Folder whose config and weights are uploaded. None: nothing is uploaded.

    Raises:
        UserError: The run cannot be started as configured: nobody is logged in, or the service
            refuses.
    """

    def __init__(self, config: TrainingConfig, run_name: str, run_dir: Path | None) -> None:
        # wandb would report its own errors to its makers, word by word, and complain if it cannot.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.run_dir = run_dir
        self._has_failed = False
        try:
            self._run = _start(config, run_name, run_dir)
        except BaseException:
            self._remove_secrets_from_logs_of_wandb()
            raise
        if run_dir is not None:
            self.saved(run_dir / CONFIG_FILE)

    def log(self, metrics: Mapping[str, float], n_samples: int) -> None:
        """Send numbers."""
        self._attempt(lambda run: run.log(dict(metrics), step=n_samples))

    def saved(self, path: Path) -> None:
        """Upload a file of the run folder."""
        self._attempt(lambda run: _upload(run, path))

    def close(self, *, has_failed: bool = False) -> None:
        """Send what is left and end the run."""
        self._attempt(lambda run: run.finish(exit_code=int(has_failed)))
        if self._has_failed:
            self._let_go()
        self._remove_secrets_from_logs_of_wandb()

    def _attempt(self, action: "Callable[[Run], object]") -> None:
        if self._run is None or self._has_failed:
            return
        try:
            action(self._run)
        # Any error, from a full disk to a dead process: the run is worth more than its log.
        except Exception as error:  # noqa: BLE001
            self._has_failed = True
            folder = self.run_dir
            kept = "" if folder is None else f"; numbers and weights are kept in {folder}"
            _warn(
                f"wandb failed and gets nothing from here on ({one_line(error)}); training "
                f"continues{kept}. Send what wandb has with `wandb sync {_sync_dir(self._run)}`"
            )

    def _let_go(self) -> None:
        # Otherwise wandb would try it at the end of the process, and show a traceback.
        import wandb

        assert self._run is not None, "only a run fails"
        try:
            self._run.finish(exit_code=1)
        except Exception:  # noqa: BLE001  (the warning has been shown)
            with suppress(Exception):
                wandb.teardown()

    def _remove_secrets_from_logs_of_wandb(self) -> None:
        # They are in the run folder and hold the messages of its errors, which may hold a key.
        if self.run_dir is None:
            return
        secrets = [secret.encode() for secret in secrets_of_environment()]
        for path in (self.run_dir / "wandb").rglob("*.log"):
            if path.is_symlink():  # which leads to another log here, or to a file elsewhere
                continue
            with suppress(OSError):  # wandb may be at work there
                with open_regular(path, MAX_LOG_BYTES) as file:
                    content = cleaned = file.read()
                for secret in secrets:
                    cleaned = cleaned.replace(secret, REDACTED.encode())
                if cleaned != content:
                    with replace_atomically(path) as temporary:
                        temporary.write_bytes(cleaned)


def check_wandb_settings() -> None:
    """See that the settings that wandb reads from the working directory send no key elsewhere.

    A folder that comes from elsewhere may have such a file.

    Raises:
        UserError: It sets more than `HARMLESS_SETTINGS`, or cannot be read.
    """
    root = Path(os.environ.get("WANDB_DIR") or ".")
    for path in (root / "wandb" / "settings", root / ".wandb" / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(read_text(path))
            others = {name for section in parser.values() for name in section} - HARMLESS_SETTINGS
            found = ", ".join(sorted(others))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, configparser.Error):
            found = "something that cannot be read"
        if found:
            raise UserError(
                f"wandb_project: '{path}' sets {found}, and wandb would obey it, which could send "
                "your key elsewhere; remove the file, and set what you need in the environment"
            )


def _start(config: TrainingConfig, run_name: str, run_dir: Path | None) -> "Run | None":
    """Start the run, on disk with a warning if the service does not answer. None: neither works.

    Raises:
        UserError: A person must change something.
    """
    if os.environ.get("WANDB_MODE") not in SILENT_MODES:
        check_wandb_settings()
    # Importing wandb takes a second, which only runs that use it should pay.
    import wandb

    arguments: dict[str, Any] = {  # of different types
        "project": config.wandb_project,
        "entity": os.environ.get("WANDB_ENTITY"),
        "name": run_name,
        "config": config.model_dump(mode="json"),
        "dir": os.environ.get("WANDB_DIR") or run_dir,
    }
    try:
        return wandb.init(**arguments, settings=_timeouts())
    # In addition to its own errors, wandb passes on those of the system and of its process.
    except Exception as error:  # noqa: BLE001
        reason = one_line(error).partition(" Consider increasing")[0]  # advice for programmers
        if _needs_a_person(error):
            raise UserError(
                f"wandb_project: no run in '{config.wandb_project}' could be started ({reason}); "
                f"{_remedy(error)}"
            ) from None
    what = f"wandb cannot be reached ({reason}); training continues without it"
    try:
        run = wandb.init(**arguments, mode="offline")
    except Exception as error:  # noqa: BLE001  (a run that could not even be kept on disk)
        kept = "" if run_dir is None else f"Numbers and weights are kept in {run_dir}. "
        _warn(
            f"{what}, and without a copy for it ({one_line(error)}). {kept}"
            "With WANDB_MODE=offline, `wandb sync` could send a run later"
        )
        return None
    _warn(f"{what} and keeps the run on disk; send it later with `wandb sync {_sync_dir(run)}`")
    return run


def _timeouts() -> dict[str, float]:
    import wandb

    known = wandb.Settings.model_fields  # older versions of wandb have no finish_timeout
    return {
        name: seconds
        for name, seconds in TIMEOUTS_S.items()
        if name in known and f"WANDB_{name.upper()}" not in os.environ
    }


def _needs_a_person(error: Exception) -> bool:
    from wandb import errors

    if isinstance(error, errors.CommError) and not isinstance(error, errors.AuthenticationError):
        return _NO_ANSWER.search(str(error)) is None
    # ValueError: a setting of the environment that wandb does not know.
    return isinstance(error, errors.AuthenticationError | errors.UsageError | ValueError)


def _remedy(error: Exception) -> str:
    from wandb import errors

    # A UsageError is a lack of keys or a wrong argument; only the message tells which.
    has_refused = isinstance(error, errors.CommError | errors.AuthenticationError)
    if has_refused or "key" in str(error).lower():
        return "set WANDB_API_KEY in .env, or WANDB_MODE=offline, or wandb_project to null"
    return "change that, or set wandb_project to null"


def _upload(run: "Run", path: Path) -> None:
    # wandb makes such a link itself if there is none, with a warning for each file.
    link = Path(run.dir) / path.name
    with suppress(OSError):  # a system without links
        link.unlink(missing_ok=True)
        link.symlink_to(path.absolute())
    run.save(path, base_path=path.parent, policy="now")


def _sync_dir(run: "Run") -> str:
    # `dir` is the folder of the run's files, inside the one that is synced.
    with suppress(Exception):
        return str(Path(run.dir).parent)
    return "DIR"


def _warn(text: str) -> None:
    say(f"warning: wandb_project: {text}")
