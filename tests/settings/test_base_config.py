import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import PositiveFloat, PositiveInt

from sparsify.settings.base_config import (
    BaseConfig,
    UserError,
    dump_yaml,
    load_config,
    nearest,
    read_yaml,
    validate_config,
)


class Term(BaseConfig):
    coeff: float
    """Weight of the term."""
    p_norm: PositiveFloat = 1.0


class Terms(BaseConfig):
    sparsity: Term | None = None
    logits_kl: Term | None = None


class Places(BaseConfig):
    sae_positions: list[str]
    """Where they sit."""
    paths: list[Path] | None = None


class Settings(BaseConfig):
    lr: PositiveFloat
    """Step size."""
    n_samples: PositiveInt | None = None
    schedule: Literal["cosine", "linear"] = "cosine"
    shuffle: bool = False
    name: str | None = None
    loss: Terms
    saes: Places


YAML = """\
lr: 1e-3
loss:
  sparsity: {coeff: 0.5}
  logits_kl: null
saes:
  sae_positions: [a.b, c.d]
"""


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


# Reading


def test_config_comes_from_yaml(path: Path):
    assert load(path) == Settings(
        lr=0.001,
        loss=Terms(sparsity=Term(coeff=0.5)),
        saes=Places(sae_positions=["a.b", "c.d"]),
    )


def test_config_is_frozen(path: Path):
    with pytest.raises(ValueError, match="frozen"):
        load(path).__setattr__("lr", 1.0)


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
        (["--saes.sae_positions", "x,y"], "saes.sae_positions", ["x", "y"]),
        (["--saes.sae_positions", '["x", "y"]'], "saes.sae_positions", ["x", "y"]),
        (["--saes.paths", "x,y"], "saes.paths", [Path("x"), Path("y")]),
    ],
)
def test_option_replaces_what_yaml_says(path: Path, argv: list[str], field: str, value: object):
    assert value_at(load(path, *argv), field) == value


def test_null_empties_a_field_that_may_be_a_list(path: Path):
    path.write_text(YAML + "  paths: [x]\n")
    assert load(path).saes.paths == [Path("x")]
    assert load(path, "--saes.paths", "null").saes.paths is None


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


# Refusals


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (YAML + "lrr: 1\n", ["  unknown key 'lrr'; did you mean 'lr'?"]),
        (YAML + "quux: 1\n", ["  unknown key 'quux'"]),
        (YAML + "1: 1\n", ["  unknown key '1'"]),
        (
            YAML.replace("coeff: 0.5", "coeff: 0.5, p_nrm: 1"),
            ["  loss.sparsity: unknown key 'p_nrm'; did you mean 'p_norm'?"],
        ),
        (YAML.replace("1e-3", "0"), ["  lr: Input should be greater than 0 (given: 0)"]),
        (
            YAML.replace("lr:", "lrr:").replace("[a.b, c.d]", "3") + "n_samples: -1\n",
            [
                "  unknown key 'lrr'; did you mean 'lr'?",
                "  lr: is required and has no default; set it",
                "  n_samples: Input should be greater than 0 (given: -1)",
                "  saes.sae_positions: Input should be a valid list (given: 3)",
            ],
        ),
        (
            "lr: 1\nloss:\nsaes: {sae_positions: []}\n",
            ["  loss: Input should be a valid dictionary or instance of Terms (given: None)"],
        ),
    ],
)
def test_problems_of_a_config_are_told_in_one_message(path: Path, text: str, problems: list[str]):
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(error.value).splitlines() == [f"{path} is not a valid config:", *problems]


def test_braces_in_a_message_are_text():
    with pytest.raises(UserError, match=r"unknown key '\{x\}'"):
        validate_config(Term, {"coeff": 1, "{x}": 2}, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [\n", "is not valid YAML; mend this: "),
        ("lr: 1\nlr: 2\n", "is not valid YAML; mend this: the key 'lr' is given twice"),
        ("loss: {sparsity: null, sparsity: null}\n", "the key 'sparsity' is given twice"),
        ("name: 2024-13-01\n", "is not valid YAML; mend this: month must be in 1..12"),
        ("- lr\n", "holds list, not 'key: value' lines"),
        ("lr", "holds str, not 'key: value' lines"),
        ("", "holds nothing, not 'key: value' lines"),
    ],
)
def test_what_is_no_yaml_mapping_is_rejected(path: Path, text: str, message: str):
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_yaml(path)
    assert str(path) in str(error.value)


def test_binary_file_is_rejected(path: Path):
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not valid YAML"):
        read_yaml(path)


def test_yaml_may_merge_a_mapping_into_another(path: Path):
    path.write_text("base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}\n")
    assert read_yaml(path)["more"] == {"a": 1, "b": 3}


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_file_that_cannot_be_read_is_named(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / name))}: cannot be read"):
        load(tmp_path / name)


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


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("hook_resid_pst", "'hook_resid_pst'; did you mean 'hook_resid_post'?"),
        ("zzz", "'zzz'"),
    ],
)
def test_nearest_names_what_is_similar(name: str, shown: str):
    assert nearest(name, ["hook_resid_pre", "hook_resid_post"]) == shown


CONFIGS = (
    "sparsify.settings.base_config",
    "sparsify.scripts.cli",
    "sparsify.runs.config",
    "sparsify.tlens.architecture",
    "sparsify.losses.loss",
    "sparsify.data.config",
    "sparsify.training.config",
    "sparsify.saes.config",
)


def test_configs_load_without_torch():
    code = (
        f"import sys, {', '.join(CONFIGS)};"
        " print(*sorted({'torch', 'transformers', 'datasets', 'transformer_lens', 'wandb',"
        " 'matplotlib'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
