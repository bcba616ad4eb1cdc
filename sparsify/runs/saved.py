"""Builds an `SAETransformer` from its settings, and from what a run has saved."""

import hashlib
from pathlib import Path

import torch

from sparsify.runs.config import SAETransformerConfig
from sparsify.runs.run_folder import CONFIG_FILE
from sparsify.runs.weight_files import (
    STATE_NAME,
    check_identity,
    checkpoint_at,
    load_metadata,
    load_weights,
    weights_path,
)
from sparsify.sae_transformer import SAETransformer
from sparsify.settings.base_config import UserError, read_yaml, validate_config
from sparsify.settings.files import open_regular
from sparsify.splicing.sae_dict import position_of
from sparsify.tlens.hook_names import matching_hook_names
from sparsify.tlens.hooked_model import TLensModel
from sparsify.tlens.loading import BUNDLED_MODELS, load_hooked_model
from sparsify.tlens.native_model import MODEL_FILE


def build_sae_transformer(config: SAETransformerConfig, device: str) -> SAETransformer:
    """Return the model of a config with new SAEs, and those of its `pretrained_sae_paths`.

    SAEs that were loaded are frozen unless `retrain_saes`.

    Raises:
        UserError: The model, a position or a checkpoint is not there, or does not fit.
    """
    return add_saes(load_model(config, device), config)


def load_model(config: SAETransformerConfig, device: str) -> TLensModel:
    """Return the model of a config; see `load_hooked_model`."""
    return load_hooked_model(
        config.tlens_model_name,
        config.tlens_model_path,
        config.tlens_model_processing,
        device,
        trust_remote_code=config.trust_remote_code,
    )


def add_saes(tlens_model: TLensModel, config: SAETransformerConfig) -> SAETransformer:
    """Add the SAEs of a config to its model; see `build_sae_transformer`."""
    positions = matching_hook_names(
        config.saes.sae_positions, tlens_model.hook_dict, "saes.sae_positions"
    )
    reads = None
    if config.saes.read_positions is not None:
        known = tlens_model.hook_dict
        reads = [
            name
            for pattern in config.saes.read_positions
            for name in matching_hook_names([pattern], known, "saes.read_positions")
        ]
    model = SAETransformer(tlens_model, positions, sae=config.saes, read_positions=reads)
    loaded_from: dict[str, Path] = {}
    for path in config.saes.pretrained_sae_paths or []:
        for position in load_saes(model, checkpoint_at(path), model_identity(config)):
            other = loaded_from.setdefault(position, path)
            if other != path:
                raise UserError(
                    f"saes.pretrained_sae_paths: '{other}' and '{path}' both have an SAE for "
                    f"{position}; name one of them"
                )
            model.saes.at(position).requires_grad_(config.saes.retrain_saes)
    return model


def load_run(path: Path, device: str, *, trust_remote_code: bool = False) -> SAETransformer:
    """Return the model of a run folder at its newest checkpoint, or at the one that `path` is.

    Args:
        path: The folder or checkpoint.
        device: Where to put the model.
        trust_remote_code: Whether Python code that comes with the run's model on the hub may be
            executed.
    """
    checkpoint = checkpoint_at(path)
    if match := STATE_NAME.fullmatch(checkpoint.name):
        weights = weights_path(checkpoint.parent, int(match[1]))
        raise UserError(
            f"{checkpoint}: is the training state; the SAEs are in {weights}, give that"
        )
    config_path = checkpoint.parent / CONFIG_FILE
    known = SAETransformerConfig.model_fields
    content = {key: value for key, value in read_yaml(config_path).items() if key in known}
    config = validate_config(SAETransformerConfig, content, str(config_path))
    # The checkpoint holds all SAEs, so what the run started from is not needed.
    saes = config.saes.model_copy(update={"pretrained_sae_paths": None})
    config = config.model_copy(update={"saes": saes, "trust_remote_code": trust_remote_code})
    model = build_sae_transformer(config, device)
    loaded = load_saes(model, checkpoint, model_identity(config))
    if missing := sorted(set(model.raw_sae_positions) - set(loaded)):
        raise UserError(
            f"{checkpoint}: has no SAE for {', '.join(missing)}; the file is not of this run"
        )
    return model.eval()


def load_saes(model: SAETransformer, path: Path, identity: dict[str, str]) -> list[str]:
    """Load a checkpoint's weights into the SAEs of `model`; returns their positions.

    Raises:
        UserError: The checkpoint was made in another model, or an SAE of it has no counterpart of
            the same shape.
    """
    check_identity(path, load_metadata(path), identity)
    weights = load_weights(path)
    keys = list(dict.fromkeys(name.split(".")[0] for name in weights))
    for key in keys:
        if key not in model.saes:
            raise UserError(
                f"{path}: has an SAE for '{key}', but sae_positions are "
                f"{', '.join(model.raw_sae_positions)}; name its hook point there"
            )
        own = {
            name.removeprefix(f"{key}."): t
            for name, t in weights.items()
            if name.startswith(f"{key}.")
        }
        _check_shapes(path, key, own, model.saes[key].state_dict())
        if bad := [name for name, tensor in own.items() if not tensor.isfinite().all()]:
            raise UserError(
                f"{path}: '{key}.{bad[0]}' holds numbers that are not finite; use another copy, or "
                "a checkpoint from before"
            )
        model.saes[key].load_state_dict(own)
    return [position_of(key) for key in keys]


def model_identity(config: SAETransformerConfig) -> dict[str, str]:
    """Identity of the model that SAEs belong to, as every checkpoint records it.

    A folder is known by its weights, as it may be moved, or hold another model the next time.
    """
    name = config.tlens_model_name
    folder = config.tlens_model_path or BUNDLED_MODELS.get(name or "")
    return {
        "tlens_model": f"weights {_digest(folder / MODEL_FILE)}" if folder else str(name),
        "tlens_model_processing": config.tlens_model_processing,
        "sae_kind": config.saes.kind,
    }


def _digest(path: Path) -> str:
    try:
        with open_regular(path) as file:
            load_metadata(path)  # which tells a file of weights, before all is read
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(
            f"tlens_model_path: '{path}' cannot be read ({error.strerror}; looked at "
            f"{path.absolute()}); if the model's folder was moved, give its new place as "
            f"tlens_model_path, to resume as --tlens_model_path"
        ) from None


def _check_shapes(
    path: Path, key: str, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if shapes != expected:
        raise UserError(
            f"{path}: the SAE '{key}' has weights {shapes}, but {expected} were expected; check "
            "the model, saes.sae_positions and saes.dict_size_to_input_ratio"
        )
