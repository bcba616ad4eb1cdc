"""This package and e2e_sae: a run folder, one of its checkpoints, or the paper's `{name}.pt` files.

A run folder has `final_config.yaml` and `samples_{N}.safetensors` (e2e_sae: `.pt`); the SAEs of the
paper lie in one folder, each `{name}.pt` beside its `{name}.yaml`, whose older keys are not read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.formats.files import read_tensors
from sparsify.formats.loaded import UNKNOWN_POSITION, LoadedSAE, Origin
from sparsify.runs.run_folder import CONFIG_FILE
from sparsify.runs.weight_files import WEIGHTS_NAME, checkpoint_at, numbered_files
from sparsify.saes.build import build_sae
from sparsify.saes.config import DEFAULT_KIND, KINDS, SAEConfig
from sparsify.settings.base_config import UserError, read_yaml, validate_config
from sparsify.splicing.sae_dict import position_of

NAME = "sparsify"


def recognises(path: Path) -> bool:
    """Return whether a path is a run folder, a checkpoint in one, or a file of the paper."""
    if path.is_dir():
        return (path / CONFIG_FILE).is_file() and bool(numbered_files(path, WEIGHTS_NAME))
    return path.is_file() and path.suffix in (".pt", ".safetensors") and _config_of(path).is_file()


def read(path: Path) -> list[LoadedSAE]:
    """Return the SAEs of a run at its newest checkpoint, or of the one that `path` is.

    Raises:
        UserError: It is damaged, or was made with settings that this version does not have.
    """
    checkpoint = checkpoint_at(path) if path.is_dir() else path
    config_path = _config_of(checkpoint)
    content = read_yaml(config_path)
    saes = content.get("saes")
    if not isinstance(saes, dict):
        raise UserError(f"{config_path}: has no settings of SAEs; use another run")
    config = _config(config_path, saes)
    weights: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(checkpoint).items():
        key, _, rest = name.partition(".")
        weights.setdefault(key, {})[rest] = tensor
    reads = saes.get("read_positions") or []
    reads = [reads] if isinstance(reads, str) else list(reads)
    return [
        LoadedSAE(
            _build(checkpoint, config, state, reads_elsewhere=bool(reads)),
            config,
            position_of(key),
            _read_position(reads, index, position_of(key)),
            _origin(content),
        )
        for index, (key, state) in enumerate(weights.items())
    ]


def _config_of(checkpoint: Path) -> Path:
    beside = checkpoint.with_suffix(".yaml")
    return beside if beside.is_file() else checkpoint.with_name(CONFIG_FILE)


def _config(path: Path, saes: Mapping[str, Any]) -> SAEConfig:
    kind = saes.get("kind", DEFAULT_KIND)
    if kind not in KINDS:
        raise UserError(f"{path}: saes.kind {kind!r} is none of {', '.join(KINDS)}")
    # Where they sit is a matter of the run; `type_of_sparsifier` and others are e2e_sae's old keys.
    known = {name: value for name, value in saes.items() if name in KINDS[kind].model_fields}
    return validate_config(KINDS[kind], known, str(path))


def _build(
    path: Path, config: SAEConfig, state: Mapping[str, Tensor], *, reads_elsewhere: bool
) -> Any:
    elements = state.get("decoder.weight", state.get("codes"))
    encoder = next((t for name, t in state.items() if name.startswith("encoder")), elements)
    if elements is None or encoder is None or elements.ndim != 2 or encoder.ndim != 2:
        raise UserError(
            f"{path}: has no weights of an SAE of kind '{config.kind}'; use another copy"
        )
    d_out = elements.shape[0] if "decoder.weight" in state else elements.shape[1]
    with torch.device("meta"):
        sae = build_sae(config, encoder.shape[1], d_out if reads_elsewhere else None)
    wanted = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        raise UserError(f"{path}: has weights {found}, but its config needs {wanted}")
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path}: '{bad[0]}' holds numbers that are not finite; use another copy")
    sae.load_state_dict(dict(state), assign=True)
    return sae


def _read_position(reads: list[str], index: int, position: str) -> str:
    if not reads:
        return position
    return reads[index] if index < len(reads) else UNKNOWN_POSITION


def _origin(content: Mapping[str, Any]) -> Origin:
    data = content.get("train_data")
    data = data if isinstance(data, dict) else {}
    return Origin(
        format=NAME,
        model_name=content.get("tlens_model_name") or str(content.get("tlens_model_path") or ""),
        processing="raw" if content.get("tlens_model_processing") == "raw" else "folded",
        n_ctx=data.get("n_ctx"),
        adds_bos=data.get("add_bos_token"),
        dataset=data.get("dataset_name"),
        details=content,
    )
