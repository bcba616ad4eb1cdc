"""Loading of hooked models: the bundled one, a folder of `train_tlens`, or a name of the field.

Only this module, `hooked_model.py` and `native_model.py` know TransformerLens versions.
"""

import os
import textwrap
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from transformer_lens.model_bridge.sources.native.model import NativeModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsify.settings.base_config import UserError, nearest
from sparsify.settings.secrets import one_line
from sparsify.tlens.architecture import Architecture
from sparsify.tlens.hooked_model import TLENS_HAS_HOOKED_TRANSFORMER, TLensModel
from sparsify.tlens.native_model import (
    NATIVE,
    bridge_config,
    hooked_transformer_weights,
    load_native_model,
    tlens_settings,
)
from sparsify.tlens.tokenizers import load_tokenizer

BUNDLED_MODELS = {"tiny-python": Path(__file__).parent.parent / "assets" / "tiny_python"}

_MAX_REASON = 300
"""Characters of a library's error that a message shows."""

Processing = Literal["folded", "raw"]


def load_hooked_model(
    name: str | None,
    path: Path | None,
    processing: Processing,
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> TLensModel:
    """Load a `HookedTransformer` where TransformerLens has it, else a `TransformerBridge`.

    Args:
        name: `tiny-python`, or a model that TransformerLens knows. None: `path` is given.
        path: Folder that `train_tlens` made. None: `name` is given.
        processing: `folded`: layer norms are folded into the weights and the weights centred, as
            `HookedTransformer.from_pretrained` does by default. `raw`: the weights as they are. The
            two compute the same logits from different activations.
        device: Where to put the model, `auto` for a CUDA GPU if there is one.
        trust_remote_code: Whether Python code that comes with a model of the hub may be executed.

    Raises:
        UserError: There is no such model, folder or device, the model needs code that is not
            trusted, or its name is also that of a folder.
    """
    device = resolve_device(device)
    folder = path or BUNDLED_MODELS.get(name or "")
    if folder:
        model = _load_folder(folder, processing)
    else:
        model = _load_by_name(str(name), processing, trust_remote_code)
    # Models are loaded on the CPU, and TransformerLens prints a line whenever one is moved.
    return model if device == "cpu" else model.to(device)


def resolve_device(device: str) -> str:
    """Return the device's name for torch; `auto` is a CUDA GPU if there is one.

    Raises:
        UserError: Torch does not see it.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if device == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available.get(device.partition(":")[0], True):
        raise UserError(f"device: torch sees no '{device}' on this machine; set it to auto")
    return device


def _load_folder(folder: Path, processing: Processing) -> TLensModel:
    architecture, native = load_native_model(folder)
    tokenizer = load_tokenizer(folder)
    if TLENS_HAS_HOOKED_TRANSFORMER:
        return _build_hooked_transformer(architecture, native, tokenizer, processing)
    return build_bridge(architecture, native, tokenizer, processing)


def _build_hooked_transformer(
    architecture: Architecture,
    native: NativeModel,
    tokenizer: Tokenizer | None,
    processing: Processing,
) -> TLensModel:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(**tlens_settings(architecture), device="cpu")
    model = HookedTransformer(cfg, tokenizer=tokenizer)
    is_folded = processing == "folded"
    model.load_and_process_state_dict(
        # Masks and rotary tables are not weights: they are those of the new model.
        {
            **model.state_dict(),
            "unembed.b_U": torch.zeros(architecture.d_vocab),
            **hooked_transformer_weights(native),
        },
        fold_ln=is_folded,
        # Only a layer norm ignores the mean that centring removes.
        center_writing_weights=is_folded and architecture.normalization_type == "LN",
        center_unembed=is_folded,
        fold_value_biases=is_folded,
    )
    return model


def build_bridge(
    architecture: Architecture,
    native: NativeModel,
    tokenizer: Tokenizer | None,
    processing: Processing,
) -> TLensModel:
    """Build a `TransformerBridge` around TransformerLens's native model."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = build_bridge_from_module(
        native, NATIVE, tl_config=bridge_config(architecture), tokenizer=tokenizer
    )
    if processing == "folded":
        model.enable_compatibility_mode(disable_warnings=True)
    return model


def _load_by_name(name: str, processing: Processing, trust_remote_code: bool) -> TLensModel:
    _check_is_no_path(name)
    try:
        if TLENS_HAS_HOOKED_TRANSFORMER:
            from transformer_lens import HookedTransformer

            if not trust_remote_code:
                _check_needs_no_code(name)
            trust: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
            if processing == "folded":
                return HookedTransformer.from_pretrained(name, device="cpu", **trust)
            return HookedTransformer.from_pretrained_no_processing(name, device="cpu", **trust)
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_transformers(
            name, device="cpu", trust_remote_code=trust_remote_code
        )
        model.enable_compatibility_mode(disable_warnings=True, no_processing=processing == "raw")
        return model
    except UserError:
        raise
    # TransformerLens and the hub client raise whatever went wrong below them; all of it means that
    # the model named by the person cannot be had.
    except Exception as error:
        raise UserError(
            f"tlens_model_name: cannot load {_reason(name, error)}; "
            f"{', '.join(BUNDLED_MODELS)} needs no network"
        ) from error


def _reason(name: str, error: Exception) -> str:
    names = [*BUNDLED_MODELS, *models_of_tlens()]
    said = textwrap.shorten(one_line(error), _MAX_REASON, placeholder=" ...")
    if name.lower() in map(str.lower, names):
        return f"'{name}' ({said})"
    # A HookedTransformer loads only what is listed, and its error is the list. A bridge tries any
    # name of the hub, so it knows better.
    if TLENS_HAS_HOOKED_TRANSFORMER:
        said = "TransformerLens has no model of this name"
    return f"{nearest(name, names)} ({said})"


def models_of_tlens() -> list[str]:
    """Return the names that TransformerLens lists. None of a version that keeps its list elsewhere.

    3.9 lists the models of `HookedTransformer`, and in a registry those of the hub that were tried
    in a `TransformerBridge`; later versions may have the registry alone.
    """
    try:
        from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

        return [*OFFICIAL_MODEL_NAMES, *chain(*MODEL_ALIASES.values())]
    except ImportError:
        pass
    try:
        from transformer_lens.tools.model_registry.api import get_supported_models

        return [model.model_id for model in get_supported_models(verified_only=True)]
    except ImportError:
        return []


def _check_is_no_path(name: str) -> None:
    """See that a model is not taken from the working directory, with whatever somebody put there.

    TransformerLens and transformers look there first, for the name or that which it stands for.
    """
    for path in (name, *_official_names(name)):
        if os.path.lexists(path):  # unlike pathlib, also for a name that no path can have
            raise UserError(
                f"tlens_model_name: '{path}' is also a file or folder in '{os.getcwd()}', which "
                "would be loaded in place of the model of that name; rename it or work in another "
                "folder. A model of a folder is named by tlens_model_path"
            )


def _official_names(name: str) -> list[str]:
    """Return the names on the hub that TransformerLens may take `name` for."""
    try:
        from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
    except ImportError:  # a version that knows no other names
        return []
    return [
        official
        for official in {*OFFICIAL_MODEL_NAMES, *MODEL_ALIASES}
        if name.lower() in map(str.lower, [official, *MODEL_ALIASES.get(official, ())])
    ]


def _check_needs_no_code(name: str) -> None:
    from transformer_lens.loading_from_pretrained import (
        NEED_REMOTE_CODE_MODELS,
        get_official_model_name,
    )

    # With these TransformerLens trusts the code by itself, with phi that of the tokenizer.
    if get_official_model_name(name).startswith((*NEED_REMOTE_CODE_MODELS, "microsoft/phi")):
        raise UserError(
            f"tlens_model_name: '{name}' may bring Python code, which TransformerLens would "
            "execute; if you trust its authors, give --trust_remote_code true on the command line "
            "(trust_remote_code=True in Python)"
        )
