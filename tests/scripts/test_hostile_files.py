"""Files and configs of others execute nothing, write nothing elsewhere, and learn no secret.

That no pickle is executed where a `.pt` is read is in `test_bad_input.py` and `test_mutations.py`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsify import SAETransformer
from sparsify.scripts.train_tlens import run_train_tlens
from sparsify.scripts.train_tlens_saes.run_train_tlens_saes import main

from .conftest import write_yaml

pytestmark = pytest.mark.model

WANDB_KEY = "0a1b2c3d4e" * 4
HF_TOKEN = "token-of-any-form-b7"
POSITION = "blocks.1.hook_resid_pre"


@pytest.fixture
def config(
    sae_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Settings of a run in the folder `work`, in which the test runs."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return {**sae_settings, "save_dir": "out", "save_every_n_samples": 8}


def run(config: dict[str, Any], *arguments: str) -> int:
    return main([str(write_yaml(Path("config.yaml"), config)), *arguments])


def run_dir_of(config: dict[str, Any]) -> Path:
    (run_dir,) = Path(config["save_dir"]).iterdir()
    return run_dir


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Secrets


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    monkeypatch.setenv("HF_TOKEN", HF_TOKEN)
    return WANDB_KEY, HF_TOKEN


@pytest.mark.slow
def test_a_run_neither_keeps_nor_shows_secrets(
    config: dict[str, Any], secrets: tuple[str, str], capfd: pytest.CaptureFixture[str]
):
    assert run(config) == 0
    assert run(config, "--resume", "--n_samples", "32") == 0
    out, err = capfd.readouterr()
    run_dir = run_dir_of(config)
    kept = contents(run_dir)
    assert {"final_config.yaml", "metrics.jsonl", "eval.json", "state_32.pt"} <= kept.keys()
    assert not [name for name, content in kept.items() for s in secrets if s.encode() in content]
    assert str(run_dir) in out
    assert not [secret for secret in secrets if secret in out + err]


def test_a_secret_of_dotenv_is_kept_out_too(
    config: dict[str, Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_API_KEY", "")  # so that it is restored after the test
    monkeypatch.delenv("WANDB_API_KEY")
    Path(".env").write_text(f"WANDB_API_KEY={WANDB_KEY}\n")
    assert run(config, "--tlens_model_path", f"models/{WANDB_KEY}") == 2
    assert "tlens_model_path: holds an access token" in (said := capfd.readouterr().err)
    assert WANDB_KEY not in said


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"wandb_project": WANDB_KEY}, (), "wandb_project: holds an access token, which would be"),
        ({"wandb_project": f"a-{HF_TOKEN}"}, (), "set WANDB_API_KEY or HF_TOKEN in .env instead"),
        ({}, ("--wandb_run_name", WANDB_KEY), "wandb_run_name: holds an access token"),
        ({}, ("--wandb_project", WANDB_KEY, "--print-config"), "wandb_project: holds an access"),
        (
            {"saes": {"sae_positions": [POSITION, HF_TOKEN], "dict_size_to_input_ratio": 1}},
            (),
            "saes.sae_positions: holds an access token",
        ),
        ({"n_samples": WANDB_KEY}, (), "n_samples: Input should be a valid integer"),
        ({WANDB_KEY: 1}, (), "unknown key '[redacted]'"),
        ({}, ("--lr", HF_TOKEN), "lr: Input should be a valid number"),
        ({}, (f"--{HF_TOKEN}", "1"), "unknown option '--[redacted]'"),
        ({}, ("--resume", f"runs/{HF_TOKEN}"), "resume: there is no folder 'runs/[redacted]'"),
    ],
)
def test_a_secret_in_the_config_is_refused_and_not_shown(
    settings: dict[str, Any],
    arguments: tuple[str, ...],
    message: str,
    config: dict[str, Any],
    secrets: tuple[str, str],
    capfd: pytest.CaptureFixture[str],
):
    assert run({**config, **settings}, *arguments) == 2
    out, err = capfd.readouterr()
    assert message in err
    assert not [secret for secret in secrets if secret in out + err]
    assert not Path("out").exists()


def test_no_part_of_a_secret_in_a_broken_config_is_shown(
    secrets: tuple[str, str], capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    path = tmp_path / "config.yaml"
    path.write_text(f"wandb_api_key: {WANDB_KEY}: 1\n")  # of a line, PyYAML shows a part
    assert main([str(path)]) == 2
    said = capfd.readouterr().err
    assert "mapping values are not allowed here" in said
    assert not [part for part in (WANDB_KEY[i : i + 8] for i in range(33)) if part in said]


# Names and links


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", ".lock", "wandb", "eval.json", "training.png", "bad_batch_24.safetensors"],
)
def test_a_link_in_a_run_folder_is_not_written_through(
    name: str, finished: Path, config: dict[str, Any], capfd: pytest.CaptureFixture[str]
):
    run_dir = shutil.copytree(finished, Path("out") / "run")
    (outside := Path("outside")).mkdir()
    (outside / "victim").write_text("untouched")
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to((outside if name == "wandb" else outside / "victim").absolute())
    assert run(config, "--resume", str(run_dir), "--n_samples", "32") == 2
    assert f"resume: '{run_dir / name}' is a link, through which" in capfd.readouterr().err
    assert contents(outside) == {"victim": b"untouched"}


def test_a_link_in_the_folder_of_a_model_is_not_written_through(
    lm_run: Path, lm_config: dict[str, Any], config: dict[str, Any], tmp_path: Path
):
    run_dir = shutil.copytree(lm_run, Path("lm"))
    (tmp_path / "victim").write_text("untouched")
    (run_dir / "model" / "README.md").unlink()
    (run_dir / "model" / "README.md").symlink_to(tmp_path / "victim")
    lm_yaml = write_yaml(Path("lm.yaml"), lm_config)
    assert run_train_tlens.main([str(lm_yaml), "--resume", str(run_dir)]) == 2
    assert (tmp_path / "victim").read_text() == "untouched"


@pytest.mark.slow
def test_links_that_are_only_read_or_replaced_may_be_there(finished: Path, config: dict[str, Any]):
    run_dir = shutil.copytree(finished, Path("out") / "run")
    name = "samples_24.safetensors"
    (outside := Path("outside")).mkdir()
    (run_dir / name).rename(outside / name)
    (run_dir / name).symlink_to((outside / name).absolute())
    before = contents(outside)
    assert run(config, "--resume", str(run_dir), "--n_samples", "32") == 0
    assert contents(outside) == before


@pytest.mark.slow
def test_names_in_a_run_folder_do_not_lead_out_of_it(
    finished: Path, config: dict[str, Any], tmp_path: Path
):
    """Names in a manifest, a config and of files are those of others."""
    run_dir = shutil.copytree(finished, Path("out") / "run")
    manifest = run_dir / "checkpoint_24.json"
    content = json.loads(manifest.read_text())
    content |= {"n_samples": "../../../24", "run_dir": str(tmp_path)}
    content["sha256"] |= {"../../../planted": "", str(tmp_path / "planted"): ""}
    manifest.write_text(json.dumps(content))
    final_config = run_dir / "final_config.yaml"
    content = yaml.safe_load(final_config.read_text()) | {"save_dir": f"{tmp_path}/planted"}
    final_config.write_text(yaml.safe_dump(content))
    before = {path.name for path in tmp_path.iterdir()}
    assert run(config, "--resume", str(run_dir), "--n_samples", "32") == 0
    assert (run_dir / "samples_32.safetensors").exists()
    assert SAETransformer.from_local_path(run_dir).raw_sae_positions == [POSITION]
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.fixture(scope="module")
def finished(sae_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 24 samples."""
    folder = tmp_path_factory.mktemp("finished")
    content = {**sae_settings, "save_every_n_samples": 8, "save_dir": str(folder / "out")}
    assert main([str(write_yaml(folder / "config.yaml", content))]) == 0
    (run_dir,) = (folder / "out").iterdir()
    return run_dir
