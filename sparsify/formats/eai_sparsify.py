"""EleutherAI's sparsify: a folder with `cfg.json` and `sae.safetensors`, or one of such folders.

    z = relu(encoder.weight (x - b_dec) + encoder.bias)       b_dec is not subtracted if `transcode`
    c = the k largest of z, or the largest of each of k groups (`activation: groupmax`)
    output = c W_dec + b_dec + x W_skip^T                     the last with `skip_connection` alone

A folder is named after the module of Hugging Face whose output is written, or whose input and
output are read and written if `transcode`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sparsify.formats.assemble import Parts, assemble, parts_of
from sparsify.formats.files import needed, read_json, read_tensors, whole_number, write_json
from sparsify.formats.hook_names import hook_name_of_input, hook_name_of_module
from sparsify.formats.loaded import UNKNOWN_POSITION, LoadedSAE, Origin
from sparsify.runs.run_folder import replace_atomically
from sparsify.saes.linear import LinearSAE
from sparsify.settings.base_config import UserError

NAME = "EleutherAI sparsify"
WEIGHTS_FILE = "sae.safetensors"
CONFIG_FILE = "cfg.json"
RUN_FILE = "config.json"
MAX_DEPTH = 2
"""Folders of hook points may hold one for each seed."""


def recognises(path: Path) -> bool:
    """Return whether a folder is one of EleutherAI's sparsify, or a run of it."""
    return bool(_folders(path))


def read(path: Path) -> list[LoadedSAE]:
    """Return the SAEs of a folder.

    Raises:
        UserError: One is damaged, or has what this package does not have.
    """
    run = path if (path / RUN_FILE).is_file() else path.parent
    run_config = read_json(run / RUN_FILE) if (run / RUN_FILE).is_file() else {}
    return [_read_one(folder, run_config) for folder in _folders(path)]


def write(loaded: LoadedSAE, folder: Path) -> None:
    """Write a folder that EleutherAI's sparsify loads.

    Raises:
        UserError: It has no such SAE.
        OSError: The folder cannot be written.
    """
    sae, config = loaded.sae, loaded.config
    if not isinstance(sae, LinearSAE) or config.n_active is None or config.kind not in KINDS:
        raise UserError(
            f"{NAME} has no SAE of kind '{config.kind}' without k; write another format"
        )
    if sae.input_scaling != "none" or sae.d_out != sae.d_act:
        raise UserError(f"{NAME} has no input_scaling and one width; write another format")
    parts = parts_of(sae)
    tensors = {
        "encoder.weight": parts.encoder,
        "encoder.bias": parts.encoder_bias,
        "W_dec": parts.decoder,
        "b_dec": parts.decoder_bias,
    }
    if parts.skip is not None:
        tensors["W_skip"] = parts.skip
    content = {
        **loaded.origin.details,
        "activation": KINDS[config.kind],
        "expansion_factor": max(1, sae.n_dict // sae.d_act),
        "normalize_decoder": sae.decoder_norm != "free",
        "num_latents": sae.n_dict,
        "k": config.n_active,
        "multi_topk": getattr(config, "multi_k", None) is not None,
        "skip_connection": parts.skip is not None,
        "transcode": not sae.is_centred,
        "d_in": sae.d_act,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replace_atomically(folder / WEIGHTS_FILE) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    write_json(folder / CONFIG_FILE, content)


KINDS = {"topk": "topk", "groupmax": "groupmax", "transcoder": "topk"}
"""Activations by our kinds."""


def _folders(path: Path) -> list[Path]:
    """Return the folders at or below `path`, in natural order, that hold an SAE."""
    depths = ["/".join("*" * depth) for depth in range(1, MAX_DEPTH + 1)]
    found = [path, *(folder for depth in depths for folder in sorted(path.glob(depth)))]
    return [f for f in found if (f / WEIGHTS_FILE).is_file() and (f / CONFIG_FILE).is_file()]


def _read_one(folder: Path, run_config: Mapping[str, Any]) -> LoadedSAE:
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    content, tensors = read_json(config_path), read_tensors(weights_path)
    encoder, encoder_bias, decoder, decoder_bias = needed(
        tensors, weights_path, "encoder.weight", "encoder.bias", "W_dec", "b_dec"
    )
    _check_is_one(config_path, content, encoder.shape)
    activation = content.get("activation", "topk")
    if activation not in ("topk", "groupmax") or content.get("signed"):
        what = "signed: true" if content.get("signed") else f"activation '{activation}'"
        raise UserError(f"{config_path}: {what} is none that this package has; use another SAE")
    is_transcoder = bool(content.get("transcode"))
    skip = needed(tensors, weights_path, "W_skip")[0] if content.get("skip_connection") else None
    name = folder.parent.name if folder.name.startswith("seed") else folder.name
    written = hook_name_of_module(name)
    read = hook_name_of_input(written) if is_transcoder and written else written
    reads_elsewhere = is_transcoder and read is not None
    kind = activation if not (reads_elsewhere and activation == "topk") else "transcoder"
    settings: dict[str, Any] = {"k": whole_number(content, "k", config_path)}
    if not reads_elsewhere:
        settings["centred"] = not is_transcoder
    if content.get("multi_topk") and kind == "topk":
        settings["multi_k"] = 4 * settings["k"]
    parts = Parts(encoder, encoder_bias, decoder, decoder_bias, skip)
    sae, config = assemble(str(folder), kind, parts, reads_elsewhere=reads_elsewhere, **settings)
    notes = []
    if is_transcoder:
        notes.append(
            f"a transcoder of the module '{name}': it reads what goes into it, of which a bridge "
            "of TransformerLens alone has a hook point"
        )
    origin = Origin(
        format=NAME,
        model_name=run_config.get("model"),
        processing="raw",  # it trains on models of Hugging Face
        n_ctx=run_config.get("ctx_len"),
        dataset=run_config.get("dataset"),
        notes=notes,
        details=content,
    )
    return LoadedSAE(sae, config, written or UNKNOWN_POSITION, read or UNKNOWN_POSITION, origin)


def _check_is_one(path: Path, content: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    d_in = whole_number(content, "d_in", path)
    n_latents = content.get("num_latents") or d_in * whole_number(content, "expansion_factor", path)
    if tuple(shape) != (n_latents, d_in):
        raise UserError(
            f"{path}: says {n_latents} latents of width {d_in}, but encoder.weight has shape "
            f"{tuple(shape)}; the files do not belong together"
        )
