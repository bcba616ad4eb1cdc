"""Settings of a resumed run, from the command line of a script that trains `LineRun`s."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from sparsify.runs.config import SAETransformerConfig
from sparsify.runs.resume import resume_line, settings_to_resume_with
from sparsify.runs.run_folder import write_config
from sparsify.runs.saved import model_identity
from sparsify.scripts.cli import EXIT_BAD_INPUT, train_script
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.settings.base_config import UserError, read_yaml, validate_config
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


@pytest.mark.parametrize("line", ["n_sample: 3\n", "warmup_samples: 48\n"])
def test_a_config_beside_it_need_not_be_valid(
    line: str, recipe: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    """It may belong to another script, or be valid only with options."""
    recipe.write_text(RECIPE + line)
    assert script(str(recipe), "--resume", "--n_samples", "48") == 0
    said = capsys.readouterr().err
    assert "recipe.yaml is not used, since a run is resumed with its own settings\n" in said
    assert "32 samples, with n_samples: 48 instead of 32" in said


def test_what_options_do_is_not_blamed_on_the_file_of_the_run(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    assert script("--resume", str(run_dir), "--warmup_samples", "64") == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert f"'{run_dir}/final_config.yaml' with the options of the command line is not a va" in said
    assert "warmup_samples (64) must be below n_samples (32)" in said


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
        (["--n_samples", "0"], "is not a valid config:\n  n_samples: Input"),
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


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}])
@pytest.mark.parametrize("is_config_given", [False, True])
def test_the_folder_of_a_run_does_not_say_that_its_code_is_trusted(
    options: dict[str, Any], is_config_given: bool, tmp_path: Path
):
    data = {"dataset_name": "python-stdlib", "n_ctx": 16}
    content = {
        **{"tlens_model_name": "x", "n_samples": 8, "batch_size": 4, "lr": 0.1},
        "loss": {"sparsity": {"coeff": 1.0}, "logits_kl": {"coeff": 1.0}},
        "saes": {"sae_positions": ["blocks.1.hook_resid_pre"], "dict_size_to_input_ratio": 2.0},
        "train_data": data,
    }
    write_config(tmp_path, Config.model_validate({**content, "trust_remote_code": True}))
    path = tmp_path / "recipe.yaml" if is_config_given else None
    named = content if is_config_given else {}
    given = {"resume": str(tmp_path), **options}
    settings, source = settings_to_resume_with(Config, path, named, given)
    assert source == tmp_path / "final_config.yaml"
    assert Config.model_validate(settings).trust_remote_code is bool(options)
    assert settings["resume"] == str(tmp_path)
    assert resume_line(tmp_path).endswith(f"--resume {tmp_path}")


def test_paths_are_recorded_so_that_they_lead_there_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    data = {"dataset_name": "text", "n_ctx": 16, "tokenizer_name": "./text"}
    config = Config.model_validate(
        {
            **{"tlens_model_path": "m", "n_samples": 8, "batch_size": 4, "lr": 0.1},
            "loss": {"sparsity": {"coeff": 1.0}},
            "saes": {
                "sae_positions": ["blocks.1.hook_resid_pre"],
                "dict_size_to_input_ratio": 2.0,
                "pretrained_sae_paths": ["a", "/b"],
            },
            "train_data": data,
            "eval_data": {"dataset_name": "org/name", "n_ctx": 16, "tokenizer_name": "text"},
        }
    )
    write_config(tmp_path, config)
    kept: Any = read_yaml(tmp_path / "final_config.yaml")
    assert kept["tlens_model_path"] == str(tmp_path / "m")
    assert kept["save_dir"] == str(tmp_path / "out")
    assert kept["saes"]["pretrained_sae_paths"] == [str(tmp_path / "a"), "/b"]
    assert kept["train_data"]["dataset_name"] == str(tmp_path / "text")
    assert kept["train_data"]["tokenizer_name"] == str(tmp_path / "text")
    assert kept["eval_data"]["dataset_name"] == "org/name"
    assert kept["eval_data"]["tokenizer_name"] == "text"


def test_a_model_that_is_not_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = SAETransformerConfig.model_validate(
        {
            "tlens_model_path": "gone/model",
            "saes": {"sae_positions": ["x"], "dict_size_to_input_ratio": 2.0},
        }
    )
    with pytest.raises(UserError) as error:
        model_identity(config)
    assert str(error.value) == (
        "tlens_model_path: 'gone/model/model.safetensors' cannot be read (No such file or directory"
        f"; looked at {tmp_path}/gone/model/model.safetensors); if the model's folder was moved, "
        "give its new place as tlens_model_path, to resume as --tlens_model_path"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"tlens_model_path": "~/m"},
        {"save_dir": "~/m"},
        {"resume": "~/m"},
        {"saes.pretrained_sae_paths": ["~/m"]},
        {"train_data.dataset_name": "~/m"},
        {"train_data.tokenizer_name": "~/m"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_home_and_homes_that_are_not_there(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {"dataset_name": "python-stdlib", "n_ctx": 16}
    saes = {"sae_positions": ["x"], "dict_size_to_input_ratio": 2.0}
    content: dict[str, Any] = {
        **{"tlens_model_path": "m", "n_samples": 8, "batch_size": 4, "lr": 0.1},
        **{"loss": {"sparsity": {"coeff": 1.0}}, "saes": saes, "train_data": data},
    }
    ((name, value),) = changes.items()
    place, _, last = name.rpartition(".")
    (content[place] if place else content)[last] = value
    found: Any = Config.model_validate(content)
    for part in name.split("."):
        found = getattr(found, part)
    (path,) = found if isinstance(found, list) else [found]
    assert str(path) == f"{tmp_path}/m"
    nobody = ["~nobody-here/m"] if isinstance(value, list) else "~nobody-here/m"
    (content[place] if place else content)[last] = nobody
    with pytest.raises(UserError, match="there is no home folder '~nobody-here'; write the path"):
        validate_config(Config, content, "here")
