"""A small language model to train: TransformerLens's own architecture, without hooks.

Training needs speed and two-dimensional weights, looking inside needs hooks. So a model is trained
as TransformerLens's `NativeModel`, with fused attention, and `loading.py` makes a hooked
model of its weights, in whichever form the installed TransformerLens has.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native.init import initialize_native_model
from transformer_lens.model_bridge.sources.native.model import NativeAttention, NativeModel

from sparsify.kernels.unembedding import Unembedding
from sparsify.settings.base_config import UserError, validate_config
from sparsify.settings.files import read_text
from sparsify.settings.secrets import one_line
from sparsify.tlens.architecture import Architecture
from sparsify.tlens.fused_attention import fused_attention

NATIVE = "TransformerLensNative"
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class FusedNativeAttention(NativeAttention):
    """Causal attention that never holds the attention pattern."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (no mask, no pattern)
        self, hidden_states: Float[Tensor, "batch pos d_model"], **_: object
    ) -> tuple[Float[Tensor, "batch pos d_model"], None]:
        """Attention output, and no pattern."""
        return fused_attention(self, hidden_states), None


class TrainableModel(nn.Module):
    """A randomly initialised language model, ready for gradient steps."""

    def __init__(self, architecture: Architecture, seed: int) -> None:
        super().__init__()
        self.architecture = architecture
        cfg = bridge_config(architecture)
        try:
            self.native = NativeModel(cfg)
        except RuntimeError as error:
            raise UserError(
                f"model: {architecture!r} does not fit into memory; lower its sizes "
                f"({one_line(error)[:300]})"
            ) from None
        initialize_native_model(self.native, cfg, seed=seed)
        for layer in self.native.layers:
            fused = FusedNativeAttention(cfg, rotary=self.native.rotary)
            fused.load_state_dict(layer.attn.state_dict())
            layer.attn = fused

    def final_residual(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the last block, before the final norm."""
        resid = self.native.tok_embed(tokens)
        if self.native.pos is not None:
            resid = resid + self.native.pos.weight[: tokens.shape[1]]
        for layer in self.native.layers:
            (resid,) = layer(resid)
        return resid

    @property
    def unembed(self) -> Unembedding:
        """Final norm and unembedding: from final residual streams to logits."""
        head = self.native.head
        return Unembedding(head.weight.T, head.bias, self.native.ln_out)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits."""
        return self.unembed(self.final_residual(tokens))


def tlens_settings(architecture: Architecture) -> dict[str, Any]:  # of many types
    """The architecture in terms that all configs of TransformerLens share."""
    return {
        **architecture.model_dump(),
        "d_head": architecture.d_head,
        "rotary_dim": architecture.d_head,
        # The native model rotates neighbouring pairs of dimensions.
        "rotary_adjacent_pairs": True,
    }


def bridge_config(architecture: Architecture) -> TransformerBridgeConfig:
    """The architecture as the native model and the bridge want it."""
    return TransformerBridgeConfig(**tlens_settings(architecture), architecture=NATIVE)


def save_language_model(folder: Path, model: TrainableModel, dtype: torch.dtype) -> None:
    """Write `model.safetensors` and `config.json` into a folder that exists.

    Files that are there are replaced: where one is a link to a file elsewhere, that stays as it is.
    """
    for name in (MODEL_FILE, CONFIG_FILE):
        (folder / name).unlink(missing_ok=True)
    weights = {name: tensor.to(dtype) for name, tensor in model.native.state_dict().items()}
    save_file(weights, folder / MODEL_FILE)
    text = model.architecture.model_dump_json(indent=1)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_native_model(folder: Path) -> tuple[Architecture, NativeModel]:
    """The model that `save_language_model` wrote, in float32.

    Raises:
        UserError: The folder does not hold such a model, or its files are damaged.
    """
    for file in (CONFIG_FILE, MODEL_FILE):
        if not os.path.isfile(folder / file):  # False where `Path.is_file` would raise
            raise UserError(
                f"tlens_model_path: '{folder}' has no {file}; give the model/ folder of a "
                "train_tlens run"
            )
    try:
        content = json.loads(read_text(folder / CONFIG_FILE))
        with safe_open(folder / MODEL_FILE, framework="pt") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except RecursionError:
        raise UserError(
            f"tlens_model_path: '{folder / CONFIG_FILE}' is damaged (brackets nested too deep); "
            "copy the folder again"
        ) from None
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(
            f"tlens_model_path: '{folder}' is damaged ({error}); copy it again"
        ) from None
    architecture = validate_config(Architecture, content, str(folder / CONFIG_FILE))
    _check_sizes(folder, architecture, shapes)
    try:
        native = NativeModel(bridge_config(architecture))
        if too_many := sorted(shapes.keys() - native.state_dict().keys()):
            raise _mismatch(folder, f"there is no {too_many[0]}")
        weights = load_file(folder / MODEL_FILE)
        native.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except (RuntimeError, SafetensorError) as error:
        raise _mismatch(folder, one_line(error)[:300]) from None
    return architecture, native


def _check_sizes(
    folder: Path, architecture: Architecture, shapes: dict[str, tuple[int, ...]]
) -> None:
    # Before a model is made, whose size may be anything in a file that is damaged or hostile.
    expected = {
        "tok_embed.weight": (architecture.d_vocab, architecture.d_model),
        f"layers.{architecture.n_layers - 1}.mlp.fc_in.weight": (
            *(architecture.d_mlp, architecture.d_model),
        ),
    }
    for name, shape in expected.items():
        found = shapes.get(name, "missing")
        if found != shape:
            raise _mismatch(folder, f"{name} is {found}, not {shape}")


def _mismatch(folder: Path, reason: str) -> UserError:
    return UserError(
        f"tlens_model_path: weights and {CONFIG_FILE} of '{folder}' do not belong together; "
        f"copy the folder again ({reason})"
    )


def hooked_transformer_weights(native: NativeModel) -> dict[str, Tensor]:
    """The weights as `HookedTransformer` names and shapes them.

    Its linear maps multiply from the right, so every weight is transposed, and it keeps the heads
    as a dimension of their own.
    """
    n_heads = native.cfg.n_heads
    tensors = {"embed.W_E": native.tok_embed.weight, "unembed.W_U": native.head.weight.T}
    if native.pos is not None:
        tensors["pos_embed.W_pos"] = native.pos.weight
    tensors |= _norm("ln_final", native.ln_out)
    layers: list[Any] = list(native.layers)  # which declare no parts
    for index, layer in enumerate(layers):
        block = f"blocks.{index}"
        tensors |= _norm(f"{block}.ln1", layer.ln1) | _norm(f"{block}.ln2", layer.ln2)
        for letter, linear in zip("QKV", (layer.attn.q, layer.attn.k, layer.attn.v), strict=True):
            weight = rearrange(linear.weight, "(h d) m -> h m d", h=n_heads)
            tensors[f"{block}.attn.W_{letter}"] = weight
            tensors[f"{block}.attn.b_{letter}"] = rearrange(linear.bias, "(h d) -> h d", h=n_heads)
        tensors[f"{block}.attn.W_O"] = rearrange(layer.attn.o.weight, "m (h d) -> h d m", h=n_heads)
        tensors[f"{block}.attn.b_O"] = layer.attn.o.bias
        for name, linear in (("in", layer.mlp.fc_in), ("out", layer.mlp.fc_out)):
            tensors[f"{block}.mlp.W_{name}"] = linear.weight.T
            tensors[f"{block}.mlp.b_{name}"] = linear.bias
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _norm(name: str, norm: nn.Module) -> dict[str, Tensor]:
    # RMS norms have a weight and no bias.
    letters = {"weight": "w", "bias": "b"}
    return {f"{name}.{letters[key]}": tensor for key, tensor in norm.named_parameters()}
