import os
from pathlib import Path

import pytest

from sparsify.settings.dotenv_file import VARIABLES, read_dotenv

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*VARIABLES, "HF_ENDPOINT", "WANDB_BASE_URL", "PYTHONPATH", "LD_PRELOAD"):
        # Set and removed again, so that what is set here is undone after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_documented_variables_are_read_and_the_environment_wins(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (folder / ".env").write_text("WANDB_API_KEY=file\nHF_TOKEN='hf $HOME'\n")
    monkeypatch.setenv("WANDB_API_KEY", "environment")
    read_dotenv()
    assert os.environ["WANDB_API_KEY"] == "environment"
    assert os.environ["HF_TOKEN"] == "hf $HOME"
    assert "WANDB_ENTITY" not in os.environ
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name", ["HF_ENDPOINT", "WANDB_BASE_URL", "PYTHONPATH", "LD_PRELOAD", "NETRC", "\x1b[2J"]
)
def test_other_variables_are_ignored_with_a_warning(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / ".env").write_text(f"{name}=/elsewhere\nHF_TOKEN=t\n")
    read_dotenv()
    assert os.environ.get(name) is None
    assert os.environ["HF_TOKEN"] == "t"
    warned = capsys.readouterr().err
    assert "\x1b" not in warned
    if name.isidentifier():
        assert f"{folder / '.env'}: '{name}' ignored, as only WANDB_API_KEY" in warned


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"HF_TOKEN=a\xffb\n", "can't decode byte 0xff"),
        (b"HF_TOKEN=a\0b\n", "it holds a NUL character"),
        (None, "it has 3,000,000,000 bytes, and at most 1,000,000 were expected"),
    ],
    ids=["not UTF-8", "NUL", "huge"],
)
def test_a_file_that_is_no_text_is_ignored_with_one_warning(
    content: bytes | None, reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    path = folder / ".env"
    path.write_bytes(content or b"")
    if content is None:
        os.truncate(path, 3_000_000_000)  # sparse: takes no room
    read_dotenv()
    assert not set(VARIABLES) & os.environ.keys()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: is ignored, as it cannot be read (")
    assert reason in line


def test_without_a_file_nothing_is_read(folder: Path, capsys: pytest.CaptureFixture[str]):
    read_dotenv()
    assert not set(VARIABLES) & os.environ.keys()
    assert capsys.readouterr().err == ""


def test_the_example_documents_what_is_read():
    lines = (ROOT / ".env.example").read_text().splitlines()
    assert [line.partition("=")[0] for line in lines if line and line[0] != "#"] == list(VARIABLES)
