import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from sparsify.scripts import cli
from sparsify.scripts.cli import run_script
from sparsify.settings.base_config import BaseConfig, UserError

RESULT_SCRIPTS = (
    "sparsify.scripts.results.run_kinds",
    "sparsify.scripts.results.run_results",
)
TRAIN = [name for name in cli.COMMANDS if name.startswith("train")]


class Settings(BaseConfig):
    lr: float


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # where `.env` is looked for
    path = tmp_path / "config.yaml"
    path.write_text("lr: 0.5\n")
    return path


def test_main_gets_the_config(path: Path):
    seen: list[Settings] = []
    assert run_script(Settings, seen.append, "Does a thing.", [str(path), "--lr", "2"]) == 0
    assert seen == [Settings(lr=2.0)]


def test_arguments_are_those_of_the_process(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["script.py", str(path)])
    seen: list[Settings] = []
    assert run_script(Settings, seen.append, "Does a thing.") == 0
    assert seen == [Settings(lr=0.5)]


def test_bad_config_is_a_message_and_exit_code_2(path: Path, capsys: pytest.CaptureFixture[str]):
    code = run_script(
        Settings, lambda _: pytest.fail("main ran"), "Does a thing.", [str(path), "--lrr", "2"]
    )
    assert code == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: unknown option '--lrr'; did you mean '--lr'?\n")


def test_bad_input_that_shows_later_is_a_message_too(
    path: Path, capsys: pytest.CaptureFixture[str]
):
    def main(_: Settings) -> None:
        raise UserError("train_data: is empty; give more")

    assert run_script(Settings, main, "Does a thing.", [str(path)]) == 2
    assert capsys.readouterr().err == "error: train_data: is empty; give more\n"


def test_interruption_has_exit_code_130(path: Path, capsys: pytest.CaptureFixture[str]):
    def main(_: Settings) -> None:
        raise KeyboardInterrupt

    assert run_script(Settings, main, "Does a thing.", [str(path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_bugs_are_not_hidden(path: Path):
    def main(_: Settings) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script(Settings, main, "Does a thing.", [str(path)])


@pytest.mark.parametrize("is_well", [True, False])
def test_dry_run_checks_in_place_of_working(is_well: bool, path: Path):
    seen: list[Settings] = []

    def preflight(config: Settings) -> bool:
        seen.append(config)
        return is_well

    argv = [str(path), "--dry-run", "--lr", "2"]
    code = run_script(
        Settings, lambda _: pytest.fail("main ran"), "Does a thing.", argv, preflight=preflight
    )
    assert code == (0 if is_well else 2)
    assert seen == [Settings(lr=2.0)]


def test_dry_run_is_in_the_help_and_not_in_the_config(
    path: Path, capsys: pytest.CaptureFixture[str]
):
    for argv in (["--help"], [str(path), "--dry-run", "--print-config"]):
        with pytest.raises(SystemExit):
            run_script(Settings, lambda _: None, "Does a thing.", argv, preflight=lambda _: True)
    printed = capsys.readouterr().out
    assert "--dry-run" in printed
    assert printed.endswith("lr: 0.5\n")


def test_a_script_without_checks_has_no_dry_run(path: Path, capsys: pytest.CaptureFixture[str]):
    argv = [str(path), "--dry-run"]
    assert run_script(Settings, lambda _: pytest.fail("main ran"), "Does a thing.", argv) == 2
    assert "unknown option '--dry-run'" in capsys.readouterr().err


def test_resume_may_stand_alone(path: Path):
    class Resumable(Settings):
        resume: Path | None = None

    seen: list[Resumable] = []
    for argv in (["--resume"], ["--resume", "--lr", "2"], ["--resume", "x"], ["--resume=x"], []):
        assert run_script(Resumable, seen.append, "Does a thing.", [str(path), *argv]) == 0
    newest, run = Path("newest"), Path("x")
    assert [config.resume for config in seen] == [newest, newest, run, run, None]


# The `sparsify` command


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Types the command; returns the exit code that the shell sees."""

    def call(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/sparsify", *argv])
        with pytest.raises(SystemExit) as stopped:
            sys.exit(cli.main())
        return int(stopped.value.code or 0)

    return call


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_command_help_describes_the_commands(
    argv: list[str], call: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert call(*argv) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: sparsify COMMAND")
    for command, module in cli.COMMANDS.items():
        assert f"{command} {str(importlib.import_module(module).__doc__).splitlines()[0]}" in shown


def test_command_help_does_not_wait_for_torch():
    code = (
        "import sys; from sparsify.scripts.cli import command_parser; command_parser();"
        " print(*{'torch', 'transformers', 'datasets', 'wandb', 'matplotlib'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_command_has_a_version(call: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"sparsify {version('sparsify-e2e')}\n"


@pytest.mark.parametrize(
    ("command", "guess"),
    [
        ("train", f"'train'; did you mean {' or '.join(map(repr, TRAIN))}?"),
        ("eval", "'eval'; did you mean 'evaluate'?"),
        ("trian-saes", "'trian-saes'; did you mean 'train-saes'?"),
        ("xyz", "'xyz'"),
    ],
)
def test_unknown_command_is_rejected(
    command: str, guess: str, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert call(command) == 2
    err = capsys.readouterr().err
    assert err == f"error: there is no command {guess} (see sparsify --help)\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_usage_names_the_command(
    command: str, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert call(command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: sparsify {command} ")


@pytest.mark.parametrize("module", [*cli.COMMANDS.values(), *RESULT_SCRIPTS])
@pytest.mark.parametrize("argument", ["--x\x1b[2J\x9b2J", "~\x1b[2Jz/a", "--processes=\x1b[2J\nx"])
def test_what_was_typed_cannot_act_on_the_terminal(
    module: str, argument: str, path: Path, capsys: pytest.CaptureFixture[str]
):
    try:
        code = importlib.import_module(module).main([str(path), argument])
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "\x1b" not in err
    assert "\x9b" not in err


@pytest.mark.parametrize("argument", ["--x\x1b[2J", "x\x1b[2J"])
def test_what_was_typed_as_a_command_cannot_act_on_the_terminal(
    argument: str, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert call(argument) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "\\x1b[2J" in err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_command_passes_its_arguments_to_the_script(
    command: str,
    call: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert call(command, "--no-such-option", "missing.yaml") == 2
    # Options of a sweep are those of the script that its file names.
    named = "missing.yaml" if command == "sweep" else "--no-such-option"
    assert named in capsys.readouterr().err


def test_keys_are_read_from_dotenv_and_the_environment_wins(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    (path.parent / ".env").write_text("WANDB_ENTITY=file\nWANDB_API_KEY=file\n")
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("WANDB_API_KEY", "environment")
    # Set and removed again, so that what run_script sets is undone after the test.
    monkeypatch.setenv("WANDB_ENTITY", "")
    monkeypatch.delenv("WANDB_ENTITY")
    seen: list[str | None] = []

    def main(_: Settings) -> None:
        seen.extend(os.environ.get(key) for key in ("WANDB_ENTITY", "WANDB_API_KEY"))

    assert run_script(Settings, main, "Does a thing.", [str(path)]) == 0
    assert seen == ["file", "environment"]


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize(
    ("option", "stdout", "code"),
    [
        ("--print-config", "/dev/full", cli.EXIT_LOST),
        ("--help", "/dev/full", cli.EXIT_LOST),
        ("--print-config", os.devnull, 0),
    ],
)
def test_a_process_whose_stdout_is_lost_ends_without_a_traceback(
    option: str, stdout: str, code: int, tmp_path: Path
):
    module = importlib.import_module(cli.COMMANDS["train-saes"])
    recipe = Path(str(module.__file__)).with_name("tiny_python_quick.yaml")
    with Path(stdout).open("w") as file:
        result = subprocess.run(
            [sys.executable, str(module.__file__), str(recipe), option],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
    warning = "warning: stdout cannot be written (No space left on device); it is left out\n"
    assert (result.returncode, result.stderr) == (code, warning if code else "")
