"""The kind that `CONTRIBUTING.md` adds: to a copy of the package, as it says, and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from .conftest import write_yaml

pytestmark = [pytest.mark.slow, pytest.mark.model]

ROOT = Path(__file__).parents[2]

TRAIN_AND_LOAD = """
import json, sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from sparsify import SAETransformer
from sparsify.scripts.train_tlens_saes.run_train_tlens_saes import main

assert main(sys.argv[1:]) == 0
(run_dir,) = Path("out").iterdir()
model = SAETransformer.from_local_path(run_dir)
(position,) = model.raw_sae_positions
(saved,) = run_dir.glob("samples_*.safetensors")
saved = load_file(saved)
loaded = {f"{position.replace('.', '-')}.{name}": value
          for name, value in model.saes.at(position).state_dict().items()}
assert loaded.keys() == saved.keys(), (loaded.keys(), saved.keys())
with torch.no_grad():
    acts = model(torch.randint(300, (3, 16)))[1][position]
print(json.dumps({
    "run_dir": str(run_dir),
    "class": type(model.saes.at(position)).__qualname__,
    "same": all(torch.equal(loaded[name], saved[name]) for name in saved),
    "moved": bool(model.saes.at(position).decoder.bias.any()),
    "smallest": acts.c[acts.c != 0].min().item(),
}))
"""


def code_of_section(title: str) -> list[str]:
    """The Python blocks of a section of `CONTRIBUTING.md`."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [
        textwrap.dedent(block)
        for block in re.findall(r"^ *```python\n(.*?)^ *```$", section, re.DOTALL | re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a copy of the package with one more kind."""
    folder = tmp_path_factory.mktemp("package")
    skipped = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "sparsify", folder / "sparsify", ignore=skipped)
    (folder / "sparsify" / "assets").symlink_to(ROOT / "sparsify" / "assets")
    module, entry = code_of_section("Add a kind of SAE")
    saes = folder / "sparsify" / "saes"
    (saes / "cutoff.py").write_text(module)
    table = (saes / "config.py").read_text()
    before, start, kinds = table.partition("\n\nKINDS: ")
    listed, end, rest = kinds.partition("    )\n}\n")
    assert start
    assert end
    added = f"{before}\n\n{entry}\n{start}{listed}        CutoffSAEConfig,\n{end}{rest}"
    (saes / "config.py").write_text(added)
    return folder


def run(package: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *argv], cwd=package, env=env, capture_output=True, text=True
    )


def test_a_new_kind_is_trained_saved_and_loaded(package: Path, sae_settings: dict[str, Any]):
    saes = {**sae_settings["saes"], "kind": "cutoff", "cutoff": 0.02}
    content = {**sae_settings, "saes": saes, "n_samples": 16, "save_dir": "out"}
    config = write_yaml(package / "config.yaml", content)
    result = run(package, "-c", TRAIN_AND_LOAD, str(config))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["class"] == "CutoffSAE"
    assert found["same"]
    assert found["moved"]
    assert found["smallest"] > 0.02
    lines = (package / found["run_dir"] / "metrics.jsonl").read_text().splitlines()
    steps = [line["grad_norm"] for line in map(json.loads, lines) if "grad_norm" in line]
    assert len(steps) == 2
    assert min(steps) > 0


def test_settings_of_a_new_kind_are_options_and_refused_on_others(package: Path):
    code = (
        "import sys; from sparsify.runs.config import SAETransformerConfig as Config; "
        "from sparsify.settings.command_line import load_config; "
        "load_config(Config, sys.argv[1:], '')"
    )
    said = " ".join(run(package, "-c", code, "--help").stdout.split())
    assert ",cutoff} One of these kinds. (default: relu)" in said
    assert "--saes.cutoff float Kind cutoff: Pre-activations up to this are left out" in said
    saes = {"sae_positions": "a", "dict_size_to_input_ratio": 2, "cutoff": 1}
    config = write_yaml(package / "relu.yaml", {"tlens_model_name": "gpt2", "saes": saes})
    refused = run(package, "-c", code, str(config)).stderr
    assert "'cutoff' belongs to kind cutoff, not to 'relu'; remove it, or set kind" in refused
