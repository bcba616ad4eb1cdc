import re
from pathlib import Path
from typing import Any

import pytest

from sparsify.settings.base_config import UserError, dump_yaml
from sparsify.settings.command_line import load_config

from .example_settings import YAML, Places, Settings, Term, Terms


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    return path


def load(path: Path, *argv: str) -> Settings:
    return load_config(Settings, [str(path), *argv], "Does a thing.")


def value_at(config: object, dotted: str) -> Any:  # any field's
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--lr", "2e-3"], "lr", 0.002),
        (["--lr=2e-3"], "lr", 0.002),
        (["--lr", "1", "--lr", "2"], "lr", 2.0),  # the last, as everywhere on the command line
        (["--n_samples", "7"], "n_samples", 7),
        (["--schedule", "linear"], "schedule", "linear"),
        (["--shuffle", "true"], "shuffle", True),
        (["--name", "x, [y"], "name", "x, [y"),
        (["--name", "null"], "name", None),
        (["--loss.sparsity.coeff", "0.7"], "loss.sparsity", Term(coeff=0.7)),
        (["--loss.sparsity.p_norm", "2"], "loss.sparsity", Term(coeff=0.5, p_norm=2.0)),
        (["--loss.logits_kl.coeff", "2"], "loss.logits_kl", Term(coeff=2.0)),
        (["--loss.sparsity", "null"], "loss.sparsity", None),
        (["--saes.sae_positions", "x"], "saes.sae_positions", ["x"]),
        (["--saes.sae_positions", "x", "y"], "saes.sae_positions", ["x", "y"]),
        (["--saes.sae_positions", "x", "y", "--lr", "1"], "saes.sae_positions", ["x", "y"]),
        (["--saes.sae_positions", "x,y", "z"], "saes.sae_positions", ["x", "y", "z"]),
        (["--saes.sae_positions=x", "--saes.sae_positions=y"], "saes.sae_positions", ["x", "y"]),
        (["--saes.sae_positions=x"], "saes.sae_positions", ["x"]),
        (["--saes.sae_positions", "x,y"], "saes.sae_positions", ["x", "y"]),
        (["--saes.sae_positions", '["x", "y"]'], "saes.sae_positions", ["x", "y"]),
        (["--saes.paths", "x", "y"], "saes.paths", [Path("x"), Path("y")]),
        (["--saes.paths", "x,y"], "saes.paths", [Path("x"), Path("y")]),
    ],
)
def test_option_replaces_what_yaml_says(path: Path, argv: list[str], field: str, value: object):
    assert value_at(load(path, *argv), field) == value


def test_null_empties_a_field_that_may_be_a_list(path: Path):
    path.write_text(YAML + "  paths: [x]\n")
    assert load(path).saes.paths == [Path("x")]
    assert load(path, "--saes.paths", "null").saes.paths is None


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--name"], "alone"),
        (["--name", "--lr", "2"], "alone"),
        (["--name", "x"], "x"),
        (["--name=null"], None),
        ([], None),
    ],
)
def test_an_option_may_stand_alone(path: Path, argv: list[str], name: str | None):
    config = load_config(Settings, [str(path), *argv], "Does a thing.", alone={"name": "alone"})
    assert config.name == name


def test_printed_config_reads_back_equal(path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["--name", "naïve: #1", "--saes.paths", "x/y"]
    with pytest.raises(SystemExit) as exit_info:
        load(path, *argv, "--print-config")
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    expected = load(path, *argv)
    assert printed == dump_yaml(expected)
    path.write_text(printed, encoding="utf-8")
    assert load(path) == expected


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        load_config(Settings, ["--help"], "Does a thing.")
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert "Does a thing." in shown
    assert "Step size." in shown
    options = set(re.findall(r"^  (--[\w.]+)", shown, flags=re.MULTILINE))
    expected = {"lr", "n_samples", "schedule", "shuffle", "name"}
    expected |= {
        f"loss.{term}.{field}" for term in Terms.model_fields for field in Term.model_fields
    }
    expected |= {f"saes.{field}" for field in Places.model_fields}
    assert {f"--{name}" for name in expected} <= options
    assert "Several: --saes.sae_positions A B" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lrr", "1"], "unknown option '--lrr'; did you mean '--lr'?"),
        (["--lrr=1"], "unknown option '--lrr'; did you mean '--lr'?"),
        (["--sched", "linear"], "unknown option '--sched'; did you mean '--schedule'?"),
        (
            ["--loss.sparsty.coeff", "1"],
            "unknown option '--loss.sparsty.coeff'; did you mean '--loss.sparsity.coeff'?",
        ),
        (["surplus"], "unknown option 'surplus'"),
        (["--lr"], "argument --lr: expected one argument; see --help"),
        (["--lr", "fast"], "lr: Input should be a valid number"),
        (["--lr", "null"], "lr: Input should be a valid number (given: None)"),
        (["--n_samples", "1.5"], "n_samples: Input should be a valid integer"),
        (["--schedule", "step"], "schedule: Input should be 'cosine' or 'linear' (given: 'step')"),
    ],
)
def test_bad_option_is_rejected(path: Path, argv: list[str], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        load(path, *argv)


def test_config_file_must_be_named():
    with pytest.raises(UserError, match=r"required: CONFIG\.yaml; see --help"):
        load_config(Settings, ["--lr", "1"], "Does a thing.")
