"""dictionary_learning: a folder with `ae.pt` and `config.json`, of any of its seven classes.

    AutoEncoder              relu(W (x - bias) + b)
    AutoEncoderNew           relu(W x + b)
    GatedAutoEncoder         relu(exp(r_mag) W (x - b_dec) + mag_bias) where W (x - b_dec) +
                             gate_bias > 0
    AutoEncoderTopK          the k largest of relu(W (x - b_dec) + b)
    BatchTopKSAE             relu(W (x - b_dec) + b) where above `threshold`
    MatryoshkaBatchTopKSAE   the same, of groups of elements
    JumpReluAutoEncoder      relu(z) where z = W x + b is above its `threshold`

Files take activations as they are, since what a training divides them by is put into the biases
when it saves. `load_dictionary` of that package scales elements of an AutoEncoder to unit norm, and
its encoder up; so do we.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.formats.assemble import (
    Parts,
    assemble,
    fold_norms,
    log_thresholds,
    parts_of,
    thresholds_of,
)
from sparsify.formats.files import (
    as_float32,
    needed,
    read_json,
    read_state,
    whole_number,
    write_json,
)
from sparsify.formats.hook_names import hook_name_of_module
from sparsify.formats.loaded import UNKNOWN_POSITION, LoadedSAE, Origin
from sparsify.runs.run_folder import replace_atomically
from sparsify.saes.linear import LinearSAE
from sparsify.saes.matryoshka import MatryoshkaSAE
from sparsify.settings.base_config import UserError

NAME = "dictionary_learning"
WEIGHTS_FILE = "ae.pt"
CONFIG_FILE = "config.json"

BACKUP_KEYS = {"ae", "norm_factor"}
"""Of the file that a training leaves when it ends early."""

CLASSES = {
    "AutoEncoder": "relu_tied_bias",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
    "JumpReluAutoEncoder": "jumprelu",
}
"""Kinds of the classes."""

NAMES = {
    "relu_tied_bias": ("encoder.weight", "encoder.bias", "decoder.weight", "bias"),
    "relu": ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"),
    "gated": ("encoder.weight", "gate_bias", "decoder.weight", "decoder_bias"),
    "topk": ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"),
    "batch_topk": ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"),
    "matryoshka": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec"),
}
"""Names of encoder, its bias, decoder and its bias. Matrices called `W_` are transposed."""


def recognises(path: Path) -> bool:
    """Return whether a folder is one of dictionary_learning."""
    return (path / WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file()


def read(path: Path) -> list[LoadedSAE]:
    """Return the SAE of a folder.

    Raises:
        UserError: It is damaged, or of another class.
    """
    config_path, weights_path = path / CONFIG_FILE, path / WEIGHTS_FILE
    content = read_json(config_path)
    trainer = content.get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{config_path}: has no settings under 'trainer'; use another copy")
    name = trainer.get("dict_class")
    if name not in CLASSES:
        raise UserError(
            f"{config_path}: dict_class {name!r} is none of {', '.join(CLASSES)}; use another SAE"
        )
    kind, notes = CLASSES[name], []
    tensors = _unscaled(weights_path, read_state(weights_path), kind, notes)
    parts = _parts(weights_path, tensors, kind)
    settings: dict[str, Any] = {}
    if kind in ("topk", "batch_topk", "matryoshka"):
        settings["k"] = _k(config_path, trainer, tensors)
    if kind in ("batch_topk", "matryoshka"):
        (threshold,) = needed(tensors, weights_path, "threshold")
        parts = replace(parts, others={"threshold": threshold})
    if kind == "matryoshka":
        settings["prefix_shares"] = _prefix_shares(weights_path, tensors)
    elif kind == "relu_tied_bias" and not parts.has_unit_norm:
        parts = fold_norms(parts)
        notes.append("norms of the decoder were folded into the encoder, as load_dictionary does")
    elif kind == "gated":
        r_mag, mag_bias = needed(tensors, weights_path, "r_mag", "mag_bias")
        parts = replace(parts, others={"log_scale": r_mag, "magnitude_bias": mag_bias})
    elif kind == "jumprelu":
        (threshold,) = needed(tensors, weights_path, "threshold")
        parts = replace(parts, others={"log_threshold": log_thresholds(threshold)})
        settings |= {
            "centred": False,
            "bandwidth": trainer.get("bandwidth", 0.001),
            "initial_threshold": 0.001,
        }
    sae, config = assemble(str(path), kind, parts, **settings)
    position = _position(trainer) or UNKNOWN_POSITION
    return [LoadedSAE(sae, config, position, position, _origin(content, trainer, notes))]


def write(loaded: LoadedSAE, folder: Path) -> None:
    """Write a folder that dictionary_learning loads.

    Raises:
        UserError: It has no such SAE.
        OSError: The folder cannot be written.
    """
    sae, config = loaded.sae, loaded.config
    names = {kind: name for name, kind in CLASSES.items()}
    if not isinstance(sae, LinearSAE) or config.kind not in names:
        raise UserError(f"{NAME} has no SAE of kind '{config.kind}'; write another format")
    if sae.skip is not None or sae.reads_elsewhere or sae.input_scaling != "none":
        raise UserError(f"{NAME} has no skip, no transcoder and no input_scaling; write another")
    if sae.is_centred != (config.kind not in ("relu", "jumprelu")):
        does = "does not subtract" if sae.is_centred else "subtracts"
        raise UserError(
            f"{NAME}: {names[config.kind]} {does} the decoder's bias, unlike this SAE; write "
            "another format"
        )
    parts = parts_of(sae)
    encoder, encoder_bias, decoder, decoder_bias = NAMES[config.kind]
    tensors = {
        encoder: parts.encoder.T if encoder.startswith("W_") else parts.encoder,
        encoder_bias: parts.encoder_bias,
        decoder: parts.decoder if decoder.startswith("W_") else parts.decoder.T,
        decoder_bias: parts.decoder_bias,
    }
    if config.n_active is not None:
        tensors["k"] = torch.tensor(config.n_active, dtype=torch.int32)
        tensors["threshold"] = parts.others.get("threshold", torch.tensor(-1.0))
    if config.kind == "matryoshka":
        assert isinstance(sae, MatryoshkaSAE)
        ends = [*sae.prefix_sizes, sae.n_dict]
        starts = [0, *ends[:-1]]
        sizes = [end - start for start, end in zip(starts, ends, strict=True)]
        tensors["group_sizes"] = torch.tensor(sizes)
    elif config.kind == "gated":
        tensors |= {"r_mag": parts.others["log_scale"], "mag_bias": parts.others["magnitude_bias"]}
    elif config.kind == "jumprelu":
        tensors["threshold"] = thresholds_of(parts.others["log_threshold"])
    trainer = {
        **loaded.origin.details.get("trainer", {}),
        "dict_class": names[config.kind],
        "activation_dim": sae.d_act,
        "dict_size": sae.n_dict,
        "lm_name": loaded.origin.model_name,
        "submodule_name": loaded.origin.details.get("trainer", {}).get(
            "submodule_name", loaded.position
        ),
    }
    if config.n_active is not None:
        trainer["k"] = config.n_active
    folder.mkdir(parents=True, exist_ok=True)
    with replace_atomically(folder / WEIGHTS_FILE) as temporary:
        torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    write_json(folder / CONFIG_FILE, {**loaded.origin.details, "trainer": trainer})


def _unscaled(
    path: Path, content: Mapping[str, Any], kind: str, notes: list[str]
) -> dict[str, Tensor]:
    """Return the tensors for activations as they are, also of a training that ended early."""
    if not content.keys() >= BACKUP_KEYS:
        return as_float32(content)
    tensors, factor = as_float32(content["ae"]), content["norm_factor"]
    if factor is None:
        return tensors
    if isinstance(factor, Tensor):
        factor = factor.item()
    if not isinstance(factor, int | float) or not 0 < factor < 1e30:
        raise UserError(
            f"{path}: norm_factor is {factor!r}, not a number above 0; use another copy"
        )
    notes.append(f"a backup of a training: its biases were scaled by norm_factor {factor:.6g}")
    scaled = {*NAMES[kind][1::2], "mag_bias", "threshold"}
    return {
        name: tensor * factor
        if name in scaled and not (tensor.ndim == 0 and tensor < 0)
        else tensor
        for name, tensor in tensors.items()
    }


def _parts(path: Path, tensors: Mapping[str, Tensor], kind: str) -> Parts:
    encoder, encoder_bias, decoder, decoder_bias = needed(tensors, path, *NAMES[kind])
    if NAMES[kind][0].startswith("W_"):
        encoder = encoder.T.contiguous()
    else:
        decoder = decoder.T.contiguous()
    return Parts(encoder, encoder_bias, decoder, decoder_bias)


def _k(path: Path, trainer: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    if "k" not in tensors:
        return whole_number(trainer, "k", path)
    k = int(tensors["k"])
    if trainer.get("k", k) != k:
        raise UserError(
            f"{path}: k is {trainer['k']!r}, but {k} in {WEIGHTS_FILE}; the files do not belong "
            "together"
        )
    return whole_number({"k": k}, "k", path)


def _prefix_shares(path: Path, tensors: Mapping[str, Tensor]) -> list[float]:
    (sizes,) = needed(tensors, path, "group_sizes")
    n_dict = tensors["W_dec"].shape[0]
    ends = list(accumulate(int(size) for size in sizes.flatten()))
    if not ends or ends[-1] != n_dict:
        raise UserError(
            f"{path}: group_sizes {sizes.tolist()} do not add up to the {n_dict} elements; use "
            "another copy"
        )
    # As settings have them: the whole dictionary is no prefix, and products are rounded down.
    return [(end + 0.5) / n_dict for end in ends[:-1]]


def _position(trainer: Mapping[str, Any]) -> str | None:
    submodule = trainer.get("submodule_name")
    return hook_name_of_module(submodule) if isinstance(submodule, str) else None


def _origin(content: Mapping[str, Any], trainer: Mapping[str, Any], notes: list[str]) -> Origin:
    buffer = content.get("buffer")
    n_ctx = buffer.get("ctx_len") if isinstance(buffer, dict) else None
    model_name = trainer.get("lm_name")
    return Origin(
        format=NAME,
        model_name=model_name if isinstance(model_name, str) else None,
        processing="raw",  # it trains on models of Hugging Face
        n_ctx=n_ctx if isinstance(n_ctx, int) else None,
        notes=notes,
        details=content,
    )
