"""Whatever is wrong in a config or a file gives one message, and leaves nothing behind."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import bad_data
import bad_files
import bad_kinds
import bad_runs
import bad_settings
import pytest
from bad_settings import REMOVED, MakeText
from make_bad_files import make_bad_files

from sparsify import SAETransformer
from sparsify.runs import saved
from sparsify.scripts.train_tlens import run_train_tlens
from sparsify.scripts.train_tlens_saes import run_train_tlens_saes
from sparsify.settings.base_config import UserError
from sparsify.tlens.loading import load_hooked_model

from .conftest import to_yaml, write_yaml


@dataclass(frozen=True)
class Case:
    """One thing that is wrong, and a part of what the person who did it reads."""

    message: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """By dotted name: what differs from a valid config."""
    make_text: MakeText | None = None
    """The config file, made from the text of a valid one."""
    arguments: tuple[str, ...] = ()
    does: Literal["train SAEs", "train a language model", "load"] = "train SAEs"


CASES = {
    **{name: Case(m, make_text=make) for name, (make, m) in bad_settings.TEXTS.items()},
    **{name: Case(m, s) for name, (s, m) in bad_settings.SETTINGS.items()},
    **{name: Case(m, s) for name, (s, m) in bad_kinds.KINDS.items()},
    **{name: Case(m, arguments=a) for name, (a, m) in bad_settings.ARGUMENTS.items()},
    **{name: Case(m, s) for name, (s, m) in bad_files.SETTINGS.items()},
    **{name: Case(m, s) for name, (s, m) in bad_data.DATA.items()},
    **{
        name: Case(m, bad_runs.GOES_ON, arguments=("--resume", f"FILES/{path}", *a))
        for name, (path, a, m) in bad_runs.RESUMED.items()
    },
    **{
        name: Case(m, s, does="train a language model")
        for name, (s, m) in bad_runs.LANGUAGE_MODELS.items()
    },
    **{
        name: Case(m, arguments=(f"FILES/{path}",), does="load")
        for name, (path, m) in bad_runs.LOADED.items()
    },
}


@pytest.fixture(scope="module", autouse=True)
def _models_are_loaded_once() -> Iterator[None]:
    # Loading takes half the time of a case that is refused after it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "load_hooked_model", functools.cache(load_hooked_model))
        yield


@pytest.fixture(scope="module")
def files(
    lm_run: Path, sae_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder that `FILES` stands for."""
    folder = tmp_path_factory.mktemp("files")
    content = {**sae_settings, **bad_runs.GOES_ON, "n_samples": 24}
    config = write_yaml(folder / "config.yaml", {**content, "save_dir": str(folder / "out")})
    assert run_train_tlens_saes.main([str(config)]) == 0
    (run_dir,) = (folder / "out").iterdir()
    make_bad_files(folder, folder / "planted", lm_run / "model", run_dir)
    return folder


def with_changes(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    content = dict(content)
    for name, value in changes.items():
        *parents, last = name.split(".")
        place = content
        for parent in parents:
            place[parent] = place = dict(place[parent])
        if value is REMOVED:
            del place[last]
        else:
            place[last] = value
    return content


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input_is_one_message_and_leaves_nothing(
    case: Case,
    files: Path,
    lm_config: dict[str, Any],
    sae_settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("FILES", str(files)) for argument in case.arguments]
    if case.does == "load":
        with pytest.raises(UserError) as caught:
            SAETransformer.from_local_path(*arguments)
        said = f"error: {caught.value}\n"
    else:
        is_lm = case.does == "train a language model"
        valid = {"save_dir": "out", **(lm_config if is_lm else sae_settings)}
        text = to_yaml(with_changes(valid, case.settings))
        text = text if case.make_text is None else case.make_text(text)
        content = text.encode() if isinstance(text, str) else text
        Path("config.yaml").write_bytes(content.replace(b"FILES", str(files).encode()))
        script = run_train_tlens if is_lm else run_train_tlens_saes
        assert script.main(["config.yaml", *arguments]) == 2
        said = capsys.readouterr().err
    assert case.message.replace("FILES", str(files)) in said
    # Behind what had been opened by then.
    assert f"\n{said}".count("\nerror: ") == 1
    assert "Traceback" not in said
    assert not Path("out").exists()
    assert not (files / "planted").exists()


def test_there_are_enough_cases_and_each_has_its_own_message():
    messages = {case.message for case in CASES.values()}
    assert len(messages) == len(CASES) >= 60


def test_nothing_has_been_written_through_a_link(files: Path):
    assert (files / "victim").read_text() == "untouched"
