import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsify.runs.config import SAETransformerConfig
from sparsify.settings.base_config import (
    UserError,
    nearest,
    read_yaml,
    validate_config,
)

from .example_settings import YAML, Places, Settings, Term, Terms


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    return path


def read(path: Path) -> Settings:
    return validate_config(Settings, read_yaml(path), str(path))


def test_config_comes_from_yaml(path: Path):
    assert read(path) == Settings(
        lr=0.001,
        loss=Terms(sparsity=Term(coeff=0.5)),
        saes=Places(sae_positions=["a.b", "c.d"]),
    )


def test_config_is_frozen(path: Path):
    with pytest.raises(ValueError, match="frozen"):
        read(path).__setattr__("lr", 1.0)


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
            YAML.replace("1e-3", "true").replace("0.5", "false, p_nrm: 1") + "lrr: 1\n1: 1\n",
            [
                "  unknown key 'lrr'; did you mean 'lr'?",
                "  unknown key '1'",
                "  lr: Input should be a number (given: True)",
                "  loss.sparsity: unknown key 'p_nrm'; did you mean 'p_norm'?",
                "  loss.sparsity.coeff: Input should be a number (given: False)",
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
        read(path)
    assert str(error.value).splitlines() == [f"{path} is not a valid config:", *problems]


@pytest.mark.parametrize(
    ("saes", "problems"),
    [
        (
            {"kind": "topk", "k": True, "bandwidth": 1, "multik": 4},
            [
                "  saes: 'bandwidth' belongs to kind jumprelu, not to 'topk'; remove it, or set "
                "kind",
                "  saes: unknown key 'multik'; did you mean 'multi_k'?",
                "  saes.k: Input should be a number (given: True)",
            ],
        ),
        (
            {"k": 2},
            [
                "  saes: 'k' belongs to kind topk, batch_topk, groupmax, matryoshka, codebook, "
                "transcoder, not to 'relu'; remove it, or set kind",
            ],
        ),
    ],
)
def test_unknown_keys_of_a_union_are_explained_by_its_kind(
    saes: dict[str, Any], problems: list[str]
):
    content = {"saes": {"sae_positions": "x", "dict_size_to_input_ratio": 2.0, **saes}}
    with pytest.raises(UserError) as error:
        validate_config(SAETransformerConfig, {"tlens_model_name": "x", **content}, "here")
    assert str(error.value).splitlines() == ["here is not a valid config:", *problems]


def test_braces_in_a_message_are_text():
    with pytest.raises(UserError, match=r"unknown key '\{x\}'"):
        validate_config(Term, {"coeff": 1, "{x}": 2}, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [\n", "is not valid YAML; fix this: "),
        ("lr: 1\nlr: 2\n", "is not valid YAML; fix this: the key 'lr' is given twice"),
        ("loss: {sparsity: null, sparsity: null}\n", "the key 'sparsity' is given twice"),
        ("name: !!timestamp x\n", "is not valid YAML; fix this: tags (!) are not supported"),
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


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_file_that_cannot_be_read_is_named(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / name))}: cannot be read"):
        read(tmp_path / name)


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
