"""A state of somebody else is refused, or a run is resumed from it: nothing else happens.

The checksums of the manifest are those of the changed files, as only damage is kept out by them. A
process that crashes would end the tests.
"""

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from example_runs import HERE, N_DONE, SAERun, sae_run_config
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsify.runs.lifecycle import run_training
from sparsify.settings.base_config import UserError

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of 32 samples that has been saved after 20."""
    folder = tmp_path_factory.mktemp("whole")
    run = SAERun(sae_run_config(folder))
    run_training(run)
    assert run.run_dir is not None
    return run.run_dir


@pytest.fixture(scope="module")
def state(whole: Path) -> dict[str, Any]:
    return torch.load(whole / f"state_{N_DONE}.pt", weights_only=True)


def resume(whole: Path, folder: Path, state: Any) -> Path:
    """Resume a copy of a run from another state, whose checksum fits."""
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(whole, run_dir)
    torch.save(state, run_dir / f"state_{N_DONE}.pt")
    names = (f"samples_{N_DONE}.safetensors", f"state_{N_DONE}.pt")
    sums = {name: hashlib.sha256((run_dir / name).read_bytes()).hexdigest() for name in names}
    manifest = run_dir / f"checkpoint_{N_DONE}.json"
    manifest.write_text(json.dumps({"n_samples": N_DONE, "sha256": sums}))
    run_training(SAERun(sae_run_config(folder, resume=manifest)))
    return run_dir


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "samples_32.safetensors")


def test_the_unchanged_state_gives_the_same_bits(
    whole: Path, state: dict[str, Any], tmp_path: Path
):
    run_dir = resume(whole, tmp_path, state)
    torch.testing.assert_close(weights(run_dir), weights(whole), rtol=0, atol=0)
    assert (run_dir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def put(*path: object, value: object) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        if value is None:
            del state[path[-1]]
        else:
            state[path[-1]] = value(state[path[-1]]) if callable(value) else value

    return change


def swapped(states: dict[int, Any]) -> dict[int, Any]:
    return dict(zip(states, reversed(states.values()), strict=True))


def sparse(rows: list[int], width: int = 3, n_rows: int = 6) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([rows]), torch.ones(len(rows), width), (n_rows, width), check_invariants=False
    )


MOMENT = ("stepper", "optimizers", 0, "state", 0)
GRADIENT = ("stepper", "gradients", 0)
CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "moment of another shape": (put(*MOMENT, "exp_avg", value=torch.zeros(2)), "exp_avg is a ten"),
    "moment that is empty": (put(*MOMENT, "exp_avg_sq", value=torch.zeros(0)), "exp_avg_sq is a"),
    "moment of another type": (put(*MOMENT, "exp_avg", value=Tensor.double), "float64"),
    "moment of integers": (put(*MOMENT, "exp_avg", value=Tensor.long), "int64"),
    "moment that is sparse": (put(*MOMENT, "exp_avg", value=Tensor.to_sparse), "sparse_coo"),
    "moment that is nowhere": (
        put(*MOMENT, "exp_avg", value=lambda t: t.to("meta")),
        "exp_avg is a tensor",
    ),
    "moment that is not finite": (
        put(*MOMENT, "exp_avg", value=lambda t: t * torch.nan),
        "but one of finite numbers was",
    ),
    "second moment below zero": (
        put(*MOMENT, "exp_avg_sq", value=lambda t: -1 - t),
        "but one without negative numbers was",
    ),
    "moment that is a number": (put(*MOMENT, "exp_avg", value=1.0), "exp_avg is 1.0, but a tensor"),
    "moment that is missing": (put(*MOMENT, "exp_avg", value=None), "'exp_avg', 'exp_avg_sq', 'st"),
    "moments that are missing": (put(*MOMENT, value=[]), "state.0 is a list of 0, but a dict"),
    "step before the first": (put(*MOMENT, "step", value=torch.tensor(-1.0)), "but 0 to 2 was exp"),
    "step after the last": (put(*MOMENT, "step", value=torch.tensor(9.0)), "step is 9.0, but 0 to"),
    "unknown parameter": (
        put("stepper", "optimizers", 0, "state", 9, value={}),
        "state.9 is 9, but the number of a parameter",
    ),
    "parameters in another order": (
        put("stepper", "optimizers", 0, "param_groups", 0, "params", value=lambda p: p[::-1]),
        "param_groups has other parameters, or in another order",
    ),
    "moments of another parameter": (
        put(
            "stepper",
            "optimizers",
            0,
            "state",
            value=swapped,
        ),
        "optimizers.0.state.",
    ),
    "optimizers that are missing": (put("stepper", "optimizers", value=[]), "is a list of 0, but"),
    "gradient of another shape": (
        put(*GRADIENT, value=torch.ones(3, 3)),
        "gradients.0 is a tensor",
    ),
    "gradient that is not finite": (
        put(*GRADIENT, value=lambda t: t / 0),
        "gradients.0 is a tensor (strided, float32, shape [6, 3]), but one of finite numbers was",
    ),
    "gradient of a row that is not there": (put(*GRADIENT, value=sparse([6])), "indices below 6"),
    "gradient of a row before the first": (put(*GRADIENT, value=sparse([-1])), "without negative"),
    "gradient of wider rows": (put(*GRADIENT, value=sparse([1], 4)), "but rows of a tensor"),
    "gradient of single entries": (
        put(*GRADIENT, value=lambda t: t.to_sparse()),
        "but rows of a tensor",
    ),
    "gradients that are missing": (
        put("stepper", "gradients", value=[]),
        "gradients is a list",
    ),
    "steps of another run": (put("stepper", "n_steps", value=7), "do not belong to 20"),
    "batches of another step": (
        put("stepper", "n_batches_in_step", value=0),
        "do not belong to 20",
    ),
    "steps that are no number": (put("stepper", "n_steps", value="2"), "which do not belong"),
    "dead counts of another shape": (
        put("dead", "n_since", HERE, value=torch.zeros(2, dtype=torch.int64)),
        "state.dead.n_since.here is a tensor (strided, int64, shape [2])",
    ),
    "dead counts below zero": (
        put("dead", "n_since", HERE, value=lambda t: t - 99),
        "one without negative numbers",
    ),
    "dead counts that are missing": (
        put("dead", "counters", value=None),
        "dead.counters is m",
    ),
    "dead counts of another SAE": (
        put("dead", "is_rare", HERE, value=None),
        "here is missi",
    ),
    "tokens below zero": (
        put("dead", "counters", HERE, "n_tokens", value=-1),
        "n_tokens is of type int, but a number that counts",
    ),
    "tokens that are no number": (
        put("firing", "counters", HERE, "n_tokens", value=1e9),
        "n_tokens is 1000000000.0, but",
    ),
    "a window that is a number": (put("firing", "is_open", value=1), "is_open is 1, but a bool"),
    "a controller that is not finite": (
        put("coefficients", "controllers", HERE, "sum", value=torch.tensor(torch.inf)),
        "controllers.here.sum is a tensor (strided, float32, shape []), but one of finite numbers",
    ),
    "samples that are no number": (put("coefficients", "n_done", value=[1]), "n_done is a list of"),
    "place that is no number": (put("loader", "n_given", value=True), "loader.n_given is bool"),
    "place before the first": (put("loader", "n_given", value=-5), "loader.n_given is int, or not"),
    "generator of another size": (
        put("random", "torch", value=torch.zeros(3, dtype=torch.uint8)),
        "random.torch is a tensor (strided, uint8, shape [3])",
    ),
    "generator that is no generator's": (
        put("random", "torch", value=torch.zeros_like),
        "was not written by this version",
    ),
    "generator beyond its words": (
        put("random", "numpy", value=lambda s: (*s[:2], 10**9, *s[3:])),
        "random.numpy is 1000000000, but at most 624",
    ),
    "generator of another kind": (
        put("random", "numpy", value=lambda s: ("PCG64", *s[1:])),
        "but 'MT19937' was expected",
    ),
    "generator of few words": (
        put("random", "python", value=lambda s: (s[0], s[1][:9], s[2])),
        "random.python.1 is a tuple of 9, but a tuple of 625",
    ),
    "length of metrics that is true": (put("metrics_bytes", value=True), "does not say how long"),
    "length of metrics beyond all": (put("metrics_bytes", value=2**70), "does not say how long"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_state_that_does_not_fit_is_refused(
    change: Callable[[Any], None], message: str, whole: Path, state: dict[str, Any], tmp_path: Path
):
    changed = copy.deepcopy(state)
    change(changed)
    with pytest.raises(UserError) as error:
        resume(whole, tmp_path, changed)
    assert message in str(error.value)
    assert f"{N_DONE}" in str(error.value)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {path.name for path in whole.iterdir()}  # nothing was put aside


STRIDED = {
    "moment whose rows are one": (*MOMENT, "exp_avg"),
    "gradient whose rows are one": GRADIENT,
    "generator whose words are one": ("random", "torch"),
    "counts that are one": ("dead", "n_since", HERE),
}


@pytest.mark.parametrize("path", STRIDED.values(), ids=STRIDED)
def test_memory_that_is_shared_within_a_tensor_is_not_written_to(
    path: tuple[object, ...], whole: Path, state: dict[str, Any], tmp_path: Path
):
    """A kernel that takes one row in memory for six would write behind it."""
    changed = copy.deepcopy(state)
    put(*path, value=lambda t: t[:1].expand(t.shape))(changed)
    if path[0] == "random":  # whose words are not all equal
        with pytest.raises(UserError, match="was not written by this version"):
            resume(whole, tmp_path, changed)
    else:
        run_dir = resume(whole, tmp_path, changed)
        assert all(tensor.isfinite().all() for tensor in weights(run_dir).values())


def test_rows_in_no_order_are_added_as_they_are(whole: Path, state: dict[str, Any], tmp_path: Path):
    ends = []
    for rows in ([4, 1], [1, 4]):
        changed = copy.deepcopy(state)
        put(*GRADIENT, value=sparse(rows))(changed)
        ends.append(weights(resume(whole, tmp_path, changed)))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


# At random


def parts(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all parts of a state, of its generators' words the first alone."""
    if path:
        yield path
    if isinstance(state, dict):
        for key, part in state.items():
            yield from parts(part, (*path, key))
    elif isinstance(state, list):
        for index, part in enumerate(state):
            yield from parts(part, (*path, index))


ODD = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63 - 1,
        2**63,
        2**100,
        0.5,
        float("nan"),
        float("inf"),
    ),
    *("", "x", [], {}, (), [[]], {"a": 1}, [None], b"\0"),
    *(torch.zeros(()), torch.ones(6, 3), torch.ones(3), torch.tensor(torch.nan), torch.eye(3) > 0),
)
HOW_TENSORS_CHANGE: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.zeros_like,
    lambda t: t[..., :1],
    lambda t: t.flatten(),
    lambda t: t.unsqueeze(0),
    lambda t: t.T.contiguous() if t.ndim == 2 else t.flip(-1) if t.ndim else t,
    lambda t: t.T.contiguous().T if t.ndim == 2 else t,
    lambda t: t[:1].expand(t.shape) if t.ndim else t.expand(4),
    lambda t: t.double() if t.is_floating_point() else t.to(torch.int32),
    lambda t: t.to(torch.complex64),
    lambda t: t.float() * torch.inf,
    lambda t: t.float() * 1e38,
    lambda t: -t.float(),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: nn.Parameter(t.float()),
    lambda t: torch.full_like(t, 2**7 - 1),
    lambda t: torch.full_like(t, 1e-45) if t.is_floating_point() else t,
)


def mutated(rng: random.Random, state: dict[str, Any]) -> dict[str, Any]:
    """A state with one to three of its parts changed, left out or in another's place."""
    state = copy.deepcopy(state)
    for _ in range(rng.randint(1, 3)):
        paths = [*parts(state)]
        *path, key = rng.choice(paths)
        at = part_at(state, path)
        if isinstance(at[key], Tensor) and rng.random() < 0.7:
            # Not each is possible after another, as of a tensor that is nowhere.
            with suppress(RuntimeError, IndexError):
                at[key] = rng.choice(HOW_TENSORS_CHANGE)(at[key])
        elif rng.random() < 0.5:
            at[key] = copy.deepcopy(rng.choice(ODD))
        elif rng.random() < 0.5 or isinstance(at, list):
            at[key] = copy.deepcopy(part_at(state, rng.choice(paths)))
        else:
            del at[key]
    return state


def part_at(state: Any, path: Sequence[object]) -> Any:
    for step in path:
        state = state[step]
    return state


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("MUTATIONS", "80")),
    derandomize="MUTATIONS" not in os.environ,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_state_is_refused_or_resumed(seed: int, whole: Path):
    state = torch.load(whole / f"state_{N_DONE}.pt", weights_only=True)
    folder = whole.parent.parent / "mutated"
    folder.mkdir(exist_ok=True)
    try:
        run_dir = resume(whole, folder, mutated(random.Random(seed), state))
    except UserError:
        return
    assert all(tensor.isfinite().all() for tensor in weights(run_dir).values())
