"""SAELens: a folder with `cfg.json` and `sae_weights.safetensors`, of version 6 or before.

Activations are rows: `W_enc` is `d_in d_sae`, `W_dec` `d_sae d_out`. With x scaled as
`normalize_activations` says, less `b_dec` if `apply_b_dec_to_input`, and z = x W_enc + b_enc:

    standard    relu(z)
    topk        the k largest of relu(z); if `rescale_acts_by_decoder_norm`, of z times the norms of
                W_dec's rows, by which the entries are divided again before they are decoded
    jumprelu    relu(z) where z > threshold
    gated       relu(x W_enc exp(r_mag) + b_mag) where x W_enc + b_gate > 0

Transcoders do not subtract `b_dec`, and do not undo the scaling; a skip adds x W_skip^T, of x as it
is. BatchTopK and Matryoshka SAEs are saved as jumprelu with one threshold for all elements.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sparsify.formats.assemble import (
    Parts,
    assemble,
    fold_norms,
    log_thresholds,
    parts_of,
    thresholds_of,
)
from sparsify.formats.files import needed, read_json, read_tensors, whole_number, write_json
from sparsify.formats.loaded import UNKNOWN_POSITION, LoadedSAE, Origin
from sparsify.runs.run_folder import replace_atomically
from sparsify.saes.config import SAEConfig
from sparsify.saes.linear import LinearSAE
from sparsify.settings.base_config import UserError

NAME = "SAELens"
CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
VERSION = "6.0.0"
"""Oldest version whose files are like those that are written here."""

SCALINGS = {
    "none": "none",
    "expected_average_only_in": "none",  # folded into the weights when a training ends
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}
FOLDED = {
    "fold_ln": True,
    "center_writing_weights": True,
    "center_unembed": True,
    "fold_value_biases": True,
}
"""Arguments with which SAELens loads a model as `HookedTransformer.from_pretrained` does."""

RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
"""Keys of a config before version 6, and what they are called since."""

MIN_BANDWIDTH = 1e-3


def recognises(path: Path) -> bool:
    """Return whether a folder is one of SAELens."""
    return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()


def read(path: Path) -> list[LoadedSAE]:
    """Return the SAE of a folder.

    Raises:
        UserError: It is damaged, or of an architecture that this package does not have.
    """
    config_path = path / CONFIG_FILE
    content = _as_version_6(read_json(config_path))
    tensors = read_tensors(path / WEIGHTS_FILE)
    notes: list[str] = []
    scale = _unfolded_scale(path)
    if scale != 1:
        tensors = _with_folded_scale(tensors, scale)
        notes.append(f"the factor {scale:.6g} of the input was folded into the weights")
    sae, config = _build(config_path, content, tensors, notes)
    metadata = content["metadata"]
    read_position = metadata.get("hook_name") or UNKNOWN_POSITION
    position = metadata.get("hook_name_out") or read_position
    return [LoadedSAE(sae, config, position, read_position, _origin(metadata, notes))]


def write(loaded: LoadedSAE, folder: Path) -> None:
    """Write a folder that SAELens loads.

    Raises:
        UserError: SAELens has no such SAE.
        OSError: The folder cannot be written.
    """
    settings, tensors = _architecture_and_tensors(loaded)
    reads_elsewhere = loaded.read_position != loaded.position
    origin = loaded.origin
    metadata = {
        **origin.details,
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "trained_with": f"sparsify {version('sparsify-e2e')}",
        "model_name": origin.model_name,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": FOLDED if origin.processing == "folded" else {},
        "hook_name": loaded.read_position,
        "hook_name_out": loaded.position if reads_elsewhere else None,
        "hook_head_index": None,
        "context_size": origin.n_ctx,
        "prepend_bos": origin.adds_bos,
        "dataset_path": origin.dataset,
    }
    scalings = {ours: theirs for theirs, ours in reversed(SCALINGS.items())}
    content = {
        **settings,
        "d_in": loaded.sae.d_act,
        "d_sae": loaded.sae.n_dict,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": _linear(loaded.sae).is_centred,
        "normalize_activations": scalings[_linear(loaded.sae).input_scaling],
        "reshape_activations": "hook_z" if loaded.read_position.endswith("hook_z") else "none",
        "metadata": {name: value for name, value in metadata.items() if value is not None},
    }
    if reads_elsewhere:
        content["d_out"] = loaded.sae.d_out
    folder.mkdir(parents=True, exist_ok=True)
    with replace_atomically(folder / WEIGHTS_FILE) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    write_json(folder / CONFIG_FILE, content)


def _build(
    path: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], notes: list[str]
) -> tuple[LinearSAE, SAEConfig]:
    architecture = content["architecture"]
    base = architecture.removesuffix("_transcoder").removesuffix("_skip")
    is_transcoder = architecture.endswith("transcoder")
    if architecture in ("transcoder", "skip_transcoder"):
        base = "standard"
    if base not in ("standard", "topk", "jumprelu", "gated"):
        raise UserError(
            f"{path}: architecture '{architecture}' is none that this package has: standard, topk, "
            "jumprelu, gated, and transcoders with a ReLU or a JumpReLU"
        )
    scaling = content.get("normalize_activations", "none")
    if scaling not in SCALINGS:
        raise UserError(
            f"{path}: normalize_activations '{scaling}' is none that this package has: "
            f"{', '.join(SCALINGS)}"
        )
    if content["metadata"].get("hook_head_index") is not None:
        raise UserError(
            f"{path}: hook_head_index: the SAE reads one head alone, which this package does not; "
            "use an SAE of all heads"
        )
    bias = "b_gate" if base == "gated" else "b_enc"
    encoder, encoder_bias, decoder, decoder_bias = needed(
        tensors, path.parent / WEIGHTS_FILE, "W_enc", bias, "W_dec", "b_dec"
    )
    skip = (
        needed(tensors, path.parent / WEIGHTS_FILE, "W_skip")[0] if "skip" in architecture else None
    )
    parts = Parts(encoder.T.contiguous(), encoder_bias, decoder, decoder_bias, skip)
    is_centred = bool(content.get("apply_b_dec_to_input", True)) and not is_transcoder
    settings: dict[str, Any] = {"input_scaling": SCALINGS[scaling]}
    if not is_transcoder:
        settings["centred"] = is_centred
    kind = {
        "standard": "transcoder" if is_transcoder else ("relu_tied_bias" if is_centred else "relu"),
    }.get(base, base)
    if base == "topk":
        settings["k"] = whole_number(content, "k", path)
        if content.get("rescale_acts_by_decoder_norm") and not parts.has_unit_norm:
            parts = fold_norms(parts)
            notes.append(
                "norms of the decoder, which rescale the code, were folded into the encoder"
            )
    elif base == "jumprelu":
        kind, others, more = _thresholds(path, content, tensors, notes)
        settings |= more
        parts = replace(parts, others=others)
    elif base == "gated":
        r_mag, b_mag = needed(tensors, path.parent / WEIGHTS_FILE, "r_mag", "b_mag")
        parts = replace(parts, others={"log_scale": r_mag, "magnitude_bias": b_mag})
    _check_sizes(path, content, parts)
    return assemble(str(path.parent), kind, parts, reads_elsewhere=is_transcoder, **settings)


def _thresholds(
    path: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], notes: list[str]
) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Return kind, further tensors and settings of an SAE with thresholds."""
    (threshold,) = needed(tensors, path.parent / WEIGHTS_FILE, "threshold")
    metadata = content["metadata"]
    details = metadata.get("training_architecture_details") or {}
    k = details.get("k") if isinstance(details, dict) else None
    is_one = threshold.numel() > 0 and bool((threshold == threshold[0]).all())
    if is_one and threshold[0] >= 0 and isinstance(k, int | float) and k >= 1:
        # As it was trained: in use it is the same as with one threshold for all.
        if "matryoshka" in str(metadata.get("training_architecture")):
            notes.append("the prefixes of a Matryoshka SAE are not in the file: a batch_topk")
        return "batch_topk", {"threshold": threshold[0].clone()}, {"k": round(k)}
    median = threshold.median().clamp(min=0).item()
    bandwidth = details.get("jumprelu_bandwidth") if isinstance(details, dict) else None
    if bandwidth is None:
        bandwidth = max(MIN_BANDWIDTH, median / 2)
        notes.append(f"no file gives the bandwidth: {bandwidth:.4g}, half of the median threshold")
    if (threshold <= 0).any():
        notes.append("thresholds of zero and below, which do nothing behind a ReLU, are just above")
    initial = median if median > 0 else MIN_BANDWIDTH
    settings = {"bandwidth": bandwidth, "initial_threshold": initial}
    return "jumprelu", {"log_threshold": log_thresholds(threshold)}, settings


def _check_sizes(path: Path, content: Mapping[str, Any], parts: Parts) -> None:
    found = {"d_sae": parts.encoder.shape[0], "d_in": parts.encoder.shape[-1]}
    for name, size in found.items():
        if content.get(name, size) != size:
            raise UserError(
                f"{path}: {name} is {content[name]!r}, but W_enc has {size}; the files do not "
                "belong together"
            )


def _origin(metadata: Mapping[str, Any], notes: list[str]) -> Origin:
    kwargs = metadata.get("model_from_pretrained_kwargs") or {}
    model_name = metadata.get("model_name")
    adds_bos = metadata.get("prepend_bos")
    n_ctx = metadata.get("context_size")
    return Origin(
        format=NAME,
        model_name=model_name if isinstance(model_name, str) else None,
        # SAELens loads models without processing, but for what these arguments ask for. Centring
        # is what the residual stream shows of it.
        processing="folded" if kwargs.get("center_writing_weights") else "raw",
        n_ctx=n_ctx if isinstance(n_ctx, int) else None,
        adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
        dataset=metadata.get("dataset_path"),
        stored_metrics={
            name: float(metadata[name])
            for name in ("l0", "num_dead_features")
            if isinstance(metadata.get(name), int | float)
        },
        notes=notes,
        details=metadata,
    )


def _as_version_6(content: dict[str, Any]) -> dict[str, Any]:
    """Return a config as version 6 writes it."""
    if isinstance(content.get("metadata"), dict):
        return {"architecture": "standard", **content}
    flat = {RENAMED.get(name, name): value for name, value in content.items()}
    kwargs = flat.get("activation_fn_kwargs") or {}
    if flat.get("activation_fn_str", flat.get("activation_fn")) == "topk" and "k" in kwargs:
        flat |= {"architecture": "topk", "k": kwargs["k"]}
    scaling = flat.get("normalize_activations")
    if scaling is None or isinstance(scaling, bool):
        flat["normalize_activations"] = "expected_average_only_in" if scaling else "none"
    flat.setdefault("prepend_bos", True)
    return {"architecture": "standard", **flat, "metadata": flat}


def _unfolded_scale(path: Path) -> float:
    """Return the factor of the input that a checkpoint of a training keeps beside its weights."""
    file = path / "activation_scaler.json"
    scale = read_json(file).get("scaling_factor") if file.is_file() else None
    if scale is None:
        return 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e30:
        raise UserError(f"{file}: scaling_factor is {scale!r}, not a number above 0; correct it")
    return float(scale)


def _with_folded_scale(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    factors = {"W_enc": scale, "W_dec": 1 / scale, "b_dec": 1 / scale}
    return {name: tensor * factors.get(name, 1.0) for name, tensor in tensors.items()}


def _linear(sae: object) -> LinearSAE:
    assert isinstance(sae, LinearSAE)
    return sae


def _architecture_and_tensors(loaded: LoadedSAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    kind = loaded.config.kind
    elsewhere = loaded.read_position != loaded.position
    sae = loaded.sae
    names = {
        "relu": "standard",
        "relu_tied_bias": "standard",
        "topk": "topk",
        "batch_topk": "jumprelu",
        "matryoshka": "jumprelu",
        "jumprelu": "jumprelu",
        "gated": "gated",
        "transcoder": "standard",
    }
    base = names.get(kind)
    if not isinstance(sae, LinearSAE) or base is None:
        raise UserError(f"{NAME} has no SAE of kind '{kind}'; write this package's own files")
    k = loaded.config.n_active
    if elsewhere and (base not in ("standard", "jumprelu") or (kind == "transcoder" and k)):
        raise UserError(f"{NAME} has no transcoder of kind '{kind}' with k; write another format")
    if sae.skip is not None and not elsewhere:
        raise UserError(f"{NAME} has a skip in transcoders alone; write another format")
    parts = parts_of(sae)
    tensors = {
        "W_enc": parts.encoder.T,
        ("b_gate" if base == "gated" else "b_enc"): parts.encoder_bias,
        "W_dec": parts.decoder,
        "b_dec": parts.decoder_bias,
    }
    settings: dict[str, Any] = {"architecture": base}
    if base == "topk":
        settings |= {"k": k, "rescale_acts_by_decoder_norm": False}
    elif base == "gated":
        tensors |= {"r_mag": parts.others["log_scale"], "b_mag": parts.others["magnitude_bias"]}
    elif kind == "jumprelu":
        tensors["threshold"] = thresholds_of(parts.others["log_threshold"])
    elif base == "jumprelu":
        threshold = parts.others["threshold"]
        if threshold < 0:
            raise UserError(
                f"the SAE at {loaded.position} has learned no threshold yet; train it first"
            )
        tensors["threshold"] = threshold.expand(sae.n_dict)
    if elsewhere:
        suffix = "_skip_transcoder" if sae.skip is not None else "_transcoder"
        settings["architecture"] = base.replace("standard", "").join(["", suffix]).removeprefix("_")
        if sae.skip is not None:
            tensors["W_skip"] = sae.skip.weight.detach().cpu()
    return settings, tensors
