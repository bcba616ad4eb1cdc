"""Whatever is done to a valid file, reading it ends with its content or with one message.

The examples are the same on every run (`derandomize`), so that nobody's change fails for what it
has not done. To look for more: `MUTATIONS=20000 python -m pytest tests/test_mutations.py`, with
which each test takes that many new ones.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations as m
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import sparsify.scripts.train_tlens_saes as scripts
from sparsify.runs.checkpoints import load_checkpoint, save_checkpoint
from sparsify.runs.weight_files import load_metadata, load_state, load_weights
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.settings.base_config import UserError, dump_yaml, read_yaml, validate_config
from sparsify.settings.command_line import load_config

RECIPE = (Path(scripts.__path__[0]) / "tiny_python_e2e.yaml").read_bytes()
MANIFEST, WEIGHTS, STATE = NAMES = ("checkpoint_8.json", "samples_8.safetensors", "state_8.pt")


def bounded(max_examples: int) -> settings:
    wanted = os.environ.get("MUTATIONS")
    return settings(
        max_examples=int(wanted or max_examples),
        derandomize=wanted is None,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # to shrink an example would take minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def read_or_refused(read: Callable[[], Any]) -> Any:  # of any type
    """What `read` returns. None: it raised a `UserError`; anything else fails the test."""
    try:
        return read()
    except UserError:
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations")


@bounded(150)
@given(content=m.mutated(RECIPE, m.YAML_MUTATIONS))
def test_a_mutated_config_is_read_or_refused(content: bytes, folder: Path):
    path = folder / "config.yaml"
    path.write_bytes(m.planting(content, folder / "planted"))
    config = read_or_refused(lambda: load_config(Config, [str(path)], ""))
    if config is not None:  # what is accepted can be kept
        path.write_text(dump_yaml(config), encoding="utf-8")
        assert validate_config(Config, read_yaml(path), "kept") == config
    assert not (folder / "planted").exists()


def plain_state() -> dict[str, Any]:  # of many types, as in `Checkpoint`
    """What a trainer's state is made of."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 4)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return {
        "stepper": {"optimizers": [optimizer.state_dict()], "n_batches": 3},
        "loader": {"place": {"epoch": 0, "position": [3, None], "remainder": [1, 2]}},
        "random": {"torch": torch.get_rng_state(), "python": (3, (1, 2), None)},
        "sparse": torch.eye(3).to_sparse(),
    }


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run folder with one checkpoint."""
    run_dir = folder / "whole"
    run_dir.mkdir()
    weights = {"a.weight": torch.ones(4, 3), "a.bias": torch.zeros(4)}
    save_checkpoint(run_dir, 8, weights, plain_state(), keep_last=1, metadata={"m": "x"})
    return run_dir


@pytest.fixture(scope="module")
def run_dir(whole: Path) -> Path:
    return shutil.copytree(whole, whole.parent / "mutated")


def seal(run_dir: Path) -> None:
    """Make the checksums of a checkpoint those of its files."""
    sums = {name: hashlib.sha256((run_dir / name).read_bytes()).hexdigest() for name in NAMES[1:]}
    (run_dir / MANIFEST).write_text(json.dumps({"n_samples": 8, "sha256": sums}))


@bounded(800)
@given(data=st.data())
def test_a_mutated_checkpoint_is_the_same_or_refused(
    data: st.DataObject, whole: Path, run_dir: Path
):
    for name in NAMES:
        shutil.copy(whole / name, run_dir / name)
    name = data.draw(st.sampled_from(NAMES))
    source = (whole / data.draw(st.sampled_from([name, name, *NAMES]))).read_bytes()
    inside = m.in_member if source.startswith(b"PK") else None
    content = data.draw(m.mutated(source, inside=inside) | st.just(source))
    (run_dir / name).write_bytes(m.planting(content, run_dir / "planted"))
    checkpoint = read_or_refused(lambda: load_checkpoint(run_dir))
    if checkpoint is not None:
        assert checkpoint.n_samples == 8
        expected = load_checkpoint(whole)
        torch.testing.assert_close(checkpoint.weights, expected.weights, rtol=0, atol=0)
        assert repr(checkpoint.state) == repr(expected.state)
    assert not (run_dir / "planted").exists()


@pytest.fixture(scope="module")
def sources(whole: Path) -> dict[str, bytes]:
    """Valid files by kind: made once, as hypothesis wants to see the same ones every time."""
    weights = {"a.weight": torch.ones(4, 3), "a.bias": torch.zeros(4)}
    path = whole.parent / "legacy.pt"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    legacy = path.read_bytes()
    # It holds addresses, which differ from run to run.
    for index, address in enumerate(sorted(set(re.findall(rb"\d{12,}", legacy)))):
        legacy = legacy.replace(address, b"%0*d" % (len(address), index))
    torch.save(weights, path)
    return {
        "safetensors": (whole / WEIGHTS).read_bytes(),
        "zip": path.read_bytes(),
        "pickle": legacy,
        "state": (whole / STATE).read_bytes(),
    }


INSIDE = {
    "safetensors": m.in_header,
    "zip": m.in_member,
    "pickle": m.hostile_pickle,
    "state": m.in_member,
}


@bounded(800)
@given(data=st.data(), kind=st.sampled_from(sorted(INSIDE)))
def test_mutated_weights_and_states_are_read_or_refused(
    data: st.DataObject, kind: str, sources: dict[str, bytes], whole: Path, run_dir: Path
):
    """Without a checksum, or with one that is right, what reads the file must refuse it."""
    content = data.draw(m.mutated(sources[kind], inside=INSIDE[kind]))
    path = run_dir / ("a.safetensors" if kind == "safetensors" else "a.pt")
    path.write_bytes(m.planting(content, run_dir / "planted"))
    if kind == "state":
        read_or_refused(lambda: load_state(path))
        for name in NAMES:
            shutil.copy(whole / name, run_dir / name)
        shutil.copy(path, run_dir / STATE)
        seal(run_dir)
        read_or_refused(lambda: load_checkpoint(run_dir))
    else:
        read_or_refused(lambda: load_weights(path))
        read_or_refused(lambda: load_metadata(path))
    assert not (run_dir / "planted").exists()
