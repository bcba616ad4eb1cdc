"""Neel Nanda's one-layer SAEs, and those that keep their layout: `{name}.pt` and `{name}_cfg.json`.

    c = relu((x - b_dec) W_enc + b_enc)
    output = c W_dec + b_dec

The published config has `d_mlp` and `dict_mult`, for the MLP's hidden layer of a model with one
block; the newer one names the hook point, `act_name`. Elements of the published files do not have
unit norm.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsify.formats.assemble import Parts, assemble, parts_of
from sparsify.formats.files import as_float32, needed, read_json, read_state, write_json
from sparsify.formats.loaded import UNKNOWN_POSITION, LoadedSAE, Origin
from sparsify.runs.run_folder import replace_atomically
from sparsify.saes.relu_tied_bias import ReLUTiedBiasSAE
from sparsify.settings.base_config import UserError

NAME = "Neel Nanda"
PUBLISHED_POSITION = "blocks.0.mlp.hook_post"
WRITTEN_NAME = "0"


def recognises(path: Path) -> bool:
    """Return whether a file is one of such SAEs, or a folder holds some."""
    return bool(_weight_files(path))


def read(path: Path) -> list[LoadedSAE]:
    """Return the SAEs of a file, or of all such files of a folder.

    Raises:
        UserError: One is damaged.
    """
    return [_read_one(file) for file in _weight_files(path)]


def write(loaded: LoadedSAE, folder: Path) -> None:
    """Write `0.pt` and `0_cfg.json` into a folder.

    Raises:
        UserError: The layout has no such SAE.
        OSError: The folder cannot be written.
    """
    sae, config = loaded.sae, loaded.config
    if (
        not isinstance(sae, ReLUTiedBiasSAE)
        or sae.skip is not None
        or sae.input_scaling != "none"
        or not sae.is_centred
    ):
        raise UserError(
            f"{NAME}: the layout is that of kind relu_tied_bias without further settings, and this "
            f"SAE is of kind '{config.kind}', or has some; write another format"
        )
    parts = parts_of(sae)
    tensors = {
        "W_enc": parts.encoder.T.contiguous(),
        "b_enc": parts.encoder_bias,
        "W_dec": parts.decoder.contiguous(),
        "b_dec": parts.decoder_bias,
    }
    layer = loaded.position.split(".")[1] if loaded.position.startswith("blocks.") else "0"
    content = {
        **loaded.origin.details,
        "act_name": loaded.position,
        "act_size": sae.d_act,
        "dict_size": sae.n_dict,
        "dict_mult": sae.n_dict / sae.d_act,
        "layer": int(layer),
        "model_name": loaded.origin.model_name,
        "enc_dtype": "fp32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replace_atomically(folder / f"{WRITTEN_NAME}.pt") as temporary:
        torch.save(tensors, temporary)
    write_json(folder / f"{WRITTEN_NAME}_cfg.json", content)


def _config_of(file: Path) -> Path:
    return file.with_name(f"{file.stem}_cfg.json")


def _weight_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    return [f for f in files if f.suffix == ".pt" and f.is_file() and _config_of(f).is_file()]


def _read_one(file: Path) -> LoadedSAE:
    content, tensors = read_json(_config_of(file)), as_float32(read_state(file))
    encoder, encoder_bias, decoder, decoder_bias = needed(
        tensors, file, "W_enc", "b_enc", "W_dec", "b_dec"
    )
    _check_sizes(_config_of(file), content, (encoder.shape[-1], encoder.shape[0]))
    parts = Parts(encoder.T.contiguous(), encoder_bias, decoder, decoder_bias)
    sae, config = assemble(str(file), "relu_tied_bias", parts)
    position = content.get("act_name")
    if position is None:
        position = PUBLISHED_POSITION if "d_mlp" in content else UNKNOWN_POSITION
    model_name = content.get("model_name")
    if model_name is None and "d_mlp" in content:
        model_name = "gelu-1l"
    origin = Origin(
        format=NAME,
        model_name=model_name,
        # The training code loads its model with from_pretrained, which folds.
        processing="folded",
        n_ctx=content.get("seq_len"),
        adds_bos=True,
        details=content,
    )
    return LoadedSAE(sae, config, str(position), str(position), origin)


def _check_sizes(path: Path, content: Mapping[str, Any], sizes: tuple[int, int]) -> None:
    n_dict, d_act = sizes
    width = content.get("act_size", content.get("d_mlp", d_act))
    n_wanted = content.get("dict_size", n_dict)
    if (width, n_wanted) != (d_act, n_dict):
        raise UserError(
            f"{path}: says {n_wanted} elements of width {width}, but W_enc has {n_dict} of width "
            f"{d_act}; the files do not belong together"
        )
