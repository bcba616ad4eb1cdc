"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`, with a `config.json` or without).

    z = x W_enc + b_enc
    c = relu(z) where z > threshold
    output = c W_dec + b_dec (+ x affine_skip_connection)

Names may be in small letters. Where the files do not say it, the hook point follows from the path
as Google keeps them: `gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.formats.assemble import Parts, assemble, log_thresholds
from sparsify.formats.files import needed, read_json, read_tensors
from sparsify.formats.loaded import UNKNOWN_POSITION, LoadedSAE, Origin
from sparsify.settings.base_config import UserError

NAME = "Gemma Scope"
FILES = ("params.npz", "params.safetensors")
CONFIG_FILE = "config.json"

RELEASE = re.compile(r"gemma-scope-(?:(2)-)?(\d+[mb])-(pt|it)(?:-(res|mlp|att|transcoders))?")
LAYER = re.compile(r"layer_(\d+)")
STORED_L0 = re.compile(r"average_l0_(\d+)")
SITE = re.compile(r"/(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/")
SITES = {
    "res": ("hook_resid_post",),
    "mlp": ("hook_mlp_out",),
    "att": ("attn.hook_z",),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
    "resid_post": ("hook_resid_post",),
    "mlp_out": ("hook_mlp_out",),
    "attn_out": ("attn.hook_z",),
    "transcoder": ("hook_mlp_in", "hook_mlp_out"),
}
"""Hook points that are read and written, by the names in paths: those of release 1, then 2."""
MODULES = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "hook_mlp_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""Hook points by the module of Hugging Face that a config names; as SAELens translates them."""
MODULE = re.compile(rf"model\.layers\.(\d+)\.({'|'.join(map(re.escape, MODULES))})")
N_CTX = 1024
MIN_BANDWIDTH = 1e-3


def recognises(path: Path) -> bool:
    """Return whether a folder or file is one of Gemma Scope."""
    return _weights_of(path) is not None


def read(path: Path) -> list[LoadedSAE]:
    """Return the SAE of a folder or file.

    Raises:
        UserError: It is damaged, or writes several layers.
    """
    file = _weights_of(path)
    assert file is not None, "recognises has said so"
    config_path = file.with_name(CONFIG_FILE)
    content = read_json(config_path) if config_path.is_file() else {}
    if content.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(
            f"{config_path}: architecture {content['architecture']!r} is not jump_relu; use another"
        )
    tensors = {_name(name): tensor for name, tensor in read_tensors(file).items()}
    encoder, encoder_bias, decoder, decoder_bias, threshold = needed(
        tensors, file, "w_enc", "b_enc", "w_dec", "b_dec", "threshold"
    )
    if decoder.ndim == 3:
        raise UserError(
            f"{file}: is a cross-layer transcoder, whose elements write {decoder.shape[1]} layers; "
            "no kind of this package does"
        )
    read_position, position = _positions(file, content)
    is_embedding = position == "hook_embed"
    notes = []
    if is_embedding:
        # It was trained on embeddings before the model multiplies them by the root of their width,
        # as TransformerLens has done at this hook point.
        root = encoder.shape[0] ** 0.5
        encoder, decoder, decoder_bias = encoder / root, decoder * root, decoder_bias * root
        notes.append("weights were scaled by the root of the width, as for embeddings")
    skip = tensors.get("affine_skip_connection")
    parts = Parts(
        encoder.T.contiguous(),
        encoder_bias,
        decoder,
        decoder_bias,
        None if skip is None else skip.T.contiguous(),
        {"log_threshold": log_thresholds(threshold)},
    )
    median = max(MIN_BANDWIDTH, threshold.median().item())
    notes.append(f"no file gives the bandwidth: {median / 2:.4g}, half of the median threshold")
    sae, config = assemble(
        str(file),
        "jumprelu",
        parts,
        reads_elsewhere=read_position != position,
        bandwidth=median / 2,
        initial_threshold=median,
        **({} if read_position != position else {"centred": False}),
    )
    return [LoadedSAE(sae, config, position, read_position, _origin(file, content, notes))]


def _weights_of(path: Path) -> Path | None:
    files = [path / name for name in FILES] if path.is_dir() else [path]
    return next((file for file in files if file.name in FILES and file.is_file()), None)


def _name(name: str) -> str:
    return name.lower() if name.lower() in ("w_enc", "w_dec") else name


def _positions(file: Path, content: Mapping[str, Any]) -> tuple[str, str]:
    """Return the hook points that are read and written."""
    read = content.get("hf_hook_point_in")
    if isinstance(read, str):
        return _hook_name(read), _hook_name(str(content.get("hf_hook_point_out") or read))
    place = file.as_posix()
    release, layer = RELEASE.search(place), LAYER.search(place)
    site = SITE.search(place)
    if release and "/embedding/" in place:
        return "hook_embed", "hook_embed"
    if release is None or layer is None or not (release[4] or site):
        return UNKNOWN_POSITION, UNKNOWN_POSITION
    hooks = SITES[release[4] or str(site and site[1])]
    return f"blocks.{layer[1]}.{hooks[0]}", f"blocks.{layer[1]}.{hooks[-1]}"


def _hook_name(module: str) -> str:
    match = MODULE.fullmatch(module)
    return f"blocks.{match[1]}.{MODULES[match[2]]}" if match else UNKNOWN_POSITION


def _origin(file: Path, content: Mapping[str, Any], notes: list[str]) -> Origin:
    release = RELEASE.search(file.as_posix())
    model_name = content.get("model_name")
    if model_name is None and release is not None:
        model_name = f"google/gemma-{'3' if release[1] else '2'}-{release[2]}"
        if release[3] == "it" or release[1]:
            model_name += f"-{release[3]}"
    l0 = content.get("l0", (STORED_L0.search(file.as_posix()) or [None, None])[1])
    return Origin(
        format=NAME,
        model_name=model_name,
        processing="raw",
        n_ctx=N_CTX,
        adds_bos=True,
        stored_metrics={} if l0 is None else {"l0": float(l0)},
        notes=notes,
        details=content,
    )
