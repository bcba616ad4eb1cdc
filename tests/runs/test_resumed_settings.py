"""Settings of a resumed run, from the command line of a script that trains `LineRun`s."""

import shlex
from pathlib import Path

import pytest

from sparsify.runs.resume import resume_line
from sparsify.scripts.cli import EXIT_BAD_INPUT, train_script
from sparsify.settings.base_config import read_yaml
from sparsify.training.config import TrainingConfig

from .test_lifecycle import LineRun

pytestmark = pytest.mark.fault

RECIPE = """\
n_samples: 32
batch_size: 4
lr: 0.1
lr_schedule: constant
log_every_n_grad_steps: 1
save_every_n_samples: 16
"""


def script(*argv: str) -> int:
    return train_script(TrainingConfig, lambda: LineRun, "Fit a line.", [*map(str, argv)])


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("recipe.yaml")
    path.write_text(RECIPE)
    return path


@pytest.fixture
def run_dir(recipe: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Folder of a run of 32 samples, as the recipe says, with `--lr 0.2`."""
    assert script(str(recipe), "--lr", "0.2") == 0
    (run_dir,) = Path("out").iterdir()
    capsys.readouterr()
    return run_dir


def settings(run_dir: Path) -> dict[str, object]:
    return read_yaml(run_dir / "final_config.yaml")


def resumed(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said of the resumption."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if ": resumes after" in line]
    return line


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (["--resume", "RUN"], ""),
        (["--resume=RUN"], ""),
        (["--resume"], ""),
        (["recipe.yaml", "--resume"], ""),
        (["recipe.yaml", "--resume", "RUN"], ""),
        (["--resume", "RUN", "recipe.yaml"], ""),
        (["--n_samples", "48", "--resume", "RUN"], ", with n_samples: 48 instead of 32"),
        (
            ["--resume", "RUN", "--n_samples=48", "--keep_last", "3", "--lr", "0.2"],
            ", with n_samples: 48 instead of 32, keep_last: 3 instead of 2",
        ),
        (["--resume", "RUN/checkpoint_32.json", "--seed", "0"], ""),
    ],
)
def test_a_run_is_resumed_with_its_settings_and_what_options_change(
    argv: list[str], changes: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    before = settings(run_dir)
    assert script(*(part.replace("RUN", str(run_dir)) for part in argv)) == 0
    assert resumed(capsys) == f"{run_dir}: resumes after 32 samples{changes}"
    after = settings(run_dir)
    assert after["lr"] == 0.2
    assert {name for name in after if after[name] != before[name]} == {
        name for name in ("n_samples", "keep_last") if f"{name}:" in changes
    }
    assert (run_dir / "samples_48.safetensors").exists() == ("48" in changes)


def test_a_config_beside_it_is_compared_and_not_used(
    recipe: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    recipe.write_text(RECIPE.replace("32", "6400") + "eval_n_samples: 7\nkeep_last: 5\n")
    before = settings(run_dir)
    assert script(str(recipe), "--resume", "--keep_last", "4", "--lr", "0.2") == 0
    said = capsys.readouterr().err
    assert (
        "recipe.yaml is not used, since a run is resumed with its own settings: "
        "n_samples: 32 instead of 6400, eval_n_samples: 500 instead of 7; to change one, give it "
        "as an option\n"
    ) in said
    assert f"{run_dir}: resumes after 32 samples, with keep_last: 4 instead of 2\n" in said
    assert settings(run_dir) == before | {"keep_last": 4}


def test_a_config_beside_it_must_be_valid(
    recipe: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    recipe.write_text(RECIPE + "n_sample: 3\n")
    assert script(str(recipe), "--resume") == EXIT_BAD_INPUT
    assert "recipe.yaml is not a valid config:\n  unknown key 'n_sample'" in capsys.readouterr().err


def test_a_dry_run_says_what_is_changed(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    before = settings(run_dir)
    assert script("--resume", str(run_dir), "--n_samples", "64", "--dry-run") == 0
    assert "32 samples, with n_samples: 64 instead of 32\n" in capsys.readouterr().out
    assert settings(run_dir) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "0.3"], "lr: 0.3 instead of 0.2; remove the change"),
        (["--n_samples", "16"], "n_samples (16) must be at least 32"),
        (["--n_samples", "0"], "final_config.yaml is not a valid config:\n  n_samples: Input"),
        (["--save_dir", "null"], "save_every_n_samples (16) needs a save_dir, which is null"),
        (["--resume", "nowhere"], "resume: there is no folder 'nowhere'; give the folder of a run"),
        (["--resume", "."], "resume: '.' is not a run of this script, or its config is damaged"),
        (["--resume", "~nobody-here/x"], "there is no home folder '~nobody-here'; write the path"),
        (["--save_dir", "elsewhere", "--resume"], "resume: no run in save_dir 'elsewhere' has a"),
    ],
)
def test_what_is_refused_changes_no_settings(
    argv: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    before = (run_dir / "final_config.yaml").read_bytes()
    assert script("--resume", str(run_dir), *argv) == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert (run_dir / "final_config.yaml").read_bytes() == before


def test_without_resume_a_config_is_needed(recipe: Path, capsys: pytest.CaptureFixture[str]):
    for argv in ([], ["--lr", "1"], ["--resume", "null"]):
        assert script(*argv) == EXIT_BAD_INPUT
        assert "required: CONFIG.yaml; see --help" in capsys.readouterr().err
    assert script("--lr", "0.2", str(recipe)) == 0


def test_the_line_that_resumes_is_short_and_works(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/sparsify", "train-line", "recipe.yaml"])
    said, _, command = resume_line(run_dir).partition(": ")
    assert said == "resume with"
    assert shlex.split(command) == ["/usr/bin/sparsify", "train-line", "--resume", str(run_dir)]
    assert script(*shlex.split(command)[2:]) == 0


def test_home_is_the_home_folder(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert script(str(recipe), "--save_dir", "~/runs") == 0
    (run_dir,) = (tmp_path / "home/runs").iterdir()
    assert script("--resume", f"~/runs/{run_dir.name}") == 0
    assert script("--resume", "--save_dir", "~/runs") == 0
    assert not Path("~").exists()
