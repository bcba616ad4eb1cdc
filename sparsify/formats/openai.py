"""OpenAI's SAEs of GPT-2 small, v1, v4 and v5 (https://github.com/openai/sparse_autoencoder).

Each is one file.

    z = encoder.weight (x - pre_bias) + latent_bias
    c = relu(z), or its k largest entries where they are positive
    output = decoder.weight c + pre_bias

A file with TopK scales each token by a layer norm first, and undoes it. A path that has
`{location}{version}/autoencoders/{layer}.pt`, as where OpenAI keeps them, tells the hook point.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.formats.assemble import Parts, assemble
from sparsify.formats.files import as_float32, needed, read_state, whole_number
from sparsify.formats.loaded import UNKNOWN_POSITION, LoadedSAE, Origin
from sparsify.settings.base_config import UserError

NAME = "OpenAI"
KEYS = {"pre_bias", "encoder.weight", "latent_bias"}

LOCATIONS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}
PATH = re.compile(rf"({'|'.join(LOCATIONS)})(?:_v\w+)?/autoencoders/(\d+)\.pt$")


def recognises(path: Path) -> bool:
    """Return whether a file is one of OpenAI's."""
    return path.suffix == ".pt" and path.is_file() and read_state(path).keys() >= KEYS


def read(path: Path) -> list[LoadedSAE]:
    """Return the SAE of a file.

    Raises:
        UserError: It is damaged, or has an activation function that this package does not have.
    """
    content = read_state(path)
    tensors = as_float32(content)
    decoder_name = "decoder.weight" if "decoder.weight" in tensors else "decoder.linear.weight"
    encoder, latent_bias, decoder, pre_bias = needed(
        tensors, path, "encoder.weight", "latent_bias", decoder_name, "pre_bias"
    )
    parts = Parts(encoder, latent_bias, decoder.T.contiguous(), pre_bias)
    kind, settings = _activation(path, content)
    sae, config = assemble(str(path), kind, parts, centred=True, **settings)
    match = PATH.search(path.as_posix())
    position = f"blocks.{match[2]}.{LOCATIONS[match[1]]}" if match else UNKNOWN_POSITION
    notes = [] if match else ["the path does not tell the hook point"]
    origin = Origin(
        format=NAME,
        model_name="gpt2",
        processing="raw",
        n_ctx=64,
        adds_bos=False,
        notes=notes,
    )
    return [LoadedSAE(sae, config, position, position, origin)]


def _activation(path: Path, content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    name = content.get("activation", "ReLU")
    if name == "ReLU":
        return "relu_tied_bias", {}
    if name != "TopK":
        raise UserError(f"{path}: activation {name!r} is neither ReLU nor TopK; use another SAE")
    state = content.get("activation_state_dict")
    state = state if isinstance(state, dict) else {}
    inner = state.get("postact_fn", content.get("activation.postact_fn", "ReLU"))
    if inner != "ReLU":
        raise UserError(
            f"{path}: TopK with postact_fn {inner!r} has negative entries, which no kind of this "
            "package has; use another SAE"
        )
    k = state.get("k", content.get("activation.k"))
    return "topk", {"k": whole_number({"k": k}, "k", path), "input_scaling": "layer_norm"}
