"""The project's own files agree with each other: launch entries, README, recipes, pins."""

import ast
import importlib
import itertools
import json
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsify.runs.config import PLACED
from sparsify.scripts.results import run_kinds
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.settings.base_config import read_yaml, validate_config

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("sparsify/scripts/*/run_*.py"))
RECIPES = sorted(ROOT.glob("sparsify/scripts/*/*.yaml"))
LAUNCH = json.loads((ROOT / ".vscode/launch.json").read_text())["configurations"]
HEAVY = ("torch", "transformers", "datasets", "transformer_lens", "wandb", "matplotlib")


def in_root(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def script_of(recipe: Path) -> Path:
    return recipe.parent / f"run_{recipe.parent.name}.py"


def launch_paths(entry: dict[str, Any]) -> list[str]:
    paths = [entry["program"], *(arg for arg in entry["args"] if "/" in arg)]
    return [path.removeprefix("${workspaceFolder}/") for path in paths]


# Launch entries and recipes


def test_there_are_recipes():
    assert SCRIPTS
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=in_root)
def test_recipe_has_a_launch_entry(recipe: Path):
    paths = [in_root(script_of(recipe)), in_root(recipe)]
    wanted = f"add an entry with program {paths[0]} and args {paths[1:]} to .vscode/launch.json"
    assert paths in [launch_paths(entry) for entry in LAUNCH], wanted


@pytest.mark.parametrize("script", SCRIPTS, ids=in_root)
def test_script_has_a_launch_entry(script: Path):
    wanted = f"add an entry with program {in_root(script)} to .vscode/launch.json"
    assert in_root(script) in [launch_paths(entry)[0] for entry in LAUNCH], wanted


@pytest.mark.parametrize("entry", LAUNCH, ids=lambda entry: entry["name"])
def test_launch_entry_names_files_that_exist(entry: dict[str, Any]):
    assert [path for path in launch_paths(entry) if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=in_root)
def test_recipe_is_valid(recipe: Path):
    module = in_root(script_of(recipe)).removesuffix(".py").replace("/", ".")
    config_class = importlib.import_module(module).Config
    config = config_class.model_validate(read_yaml(recipe))
    assert config_class.model_validate(config.model_dump(mode="json")) == config


def test_each_kind_has_recipes_that_are_valid_and_named_after_it():
    for mix, kind in itertools.product(run_kinds.MIXES, PLACED):
        recipe = run_kinds.RECIPES / f"{kind}_{mix}.yaml"
        config = validate_config(Config, read_yaml(recipe), str(recipe))
        assert config.wandb_run_name == recipe.stem
        assert config.saes.kind == kind
        assert ("logits_kl" in config.loss.terms()) == (mix == "e2e")


# README


EXAMPLE = "cutoff"
"""Part of the names of files that CONTRIBUTING.md has a reader write."""
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def code_in(document: Path) -> str:
    text = document.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))


def expand_braces(path: str) -> Iterator[str]:
    """`a_{b,c}.py` as the shell reads it: `a_b.py` and `a_c.py`."""
    parts = re.split(r"\{(.*?)\}", path)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    yield from ("".join(choice) for choice in itertools.product(*choices))


@pytest.mark.parametrize("document", DOCUMENTS, ids=in_root)
def test_paths_in_documents_exist(document: Path):
    pattern = r"(?<![\w/.-])(?:sparsify/|tests/|\.ci/|\.vscode/)[\w./{},*-]*"
    named = {path.rstrip(".,") for path in re.findall(pattern, code_in(document))}
    paths = sorted({path for name in named for path in expand_braces(name)})
    assert [path for path in paths if EXAMPLE not in path and not any(ROOT.glob(path))] == []


def test_make_targets_in_readme_exist():
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", code_in(ROOT / "README.md")))
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"train", "test"} <= named
    assert named - targets == set()


# Imports and pins


@pytest.mark.parametrize(
    "module",
    ["sparsify", "sparsify.scripts.cli", *(in_root(s)[:-3].replace("/", ".") for s in SCRIPTS)],
)
def test_import_is_light(module: str):
    code = f"import sys, {module}; print(*sorted(sys.modules.keys() & {set(HEAVY)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def pins() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def test_torch_is_pinned():
    assert pins()["torch"] == "2.13.0"


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    needed = itertools.chain(project["dependencies"], *extras)
    names = {re.split(r"[<>=\[]", need)[0] for need in needed} - {project["name"]}
    assert names - pins().keys() == set()


# The tests themselves


def test_other_machines_are_out_of_reach():
    with pytest.raises(pytest.fail.Exception, match=r"tried to reach 'example\.org'"):
        socket.create_connection(("example.org", 80), timeout=1)


def test_this_machine_is_within_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


# Code of others


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the package, and what it calls."""
    for path in ROOT.glob("sparsify/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node


def argument(call: ast.Call, name: str) -> object:
    """A literal argument; what else it is as text. None: it is not given."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}.get(name)
    if given is None:
        return None
    return given.value if isinstance(given, ast.Constant) else ast.unparse(given)


def test_no_call_executes_code_of_a_file():
    seen = {"torch.load": 0, "yaml.load": 0, "AutoTokenizer.from_pretrained": 0, "load_dataset": 0}
    for name, call in calls():
        seen[name] = seen.get(name, 0) + 1
        assert name not in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load")
        assert not re.fullmatch(r"(c?[Pp]ickle|dill|joblib|shelve)\.\w*(load|open)\w*", name)
        assert argument(call, "trust_remote_code") is not True
        if name == "torch.load":
            assert argument(call, "weights_only") is True
        if name == "yaml.load":
            assert ast.unparse(call.args[1]) == "_StrictLoader"
        if name == "AutoTokenizer.from_pretrained":
            assert argument(call, "trust_remote_code") is False
    assert all(seen.values())
