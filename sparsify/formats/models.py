"""Models with SAEs of any source, for `SAETransformer.from_pretrained`."""

from collections.abc import Mapping
from pathlib import Path

from sparsify.formats import native
from sparsify.formats.door import load, locate
from sparsify.formats.loaded import UNKNOWN_POSITION, LoadedSAEs
from sparsify.runs.run_folder import CONFIG_FILE
from sparsify.runs.saved import load_run
from sparsify.sae_transformer import SAETransformer
from sparsify.settings.base_config import UserError, nearest
from sparsify.tlens.hooked_model import TLensModel
from sparsify.tlens.loading import load_hooked_model
from sparsify.tlens.processing import processing_of


def model_with_saes(
    source: str | Path,
    tlens_model: TLensModel | str | None,
    device: str,
    *,
    trust_remote_code: bool = False,
) -> SAETransformer:
    """Return a model with the SAEs of a source, in eval mode; see `from_pretrained`."""
    path = locate(source)
    is_run = native.recognises(path) and _folder(path).joinpath(CONFIG_FILE).is_file()
    if is_run and tlens_model is None:
        return load_run(path, device, trust_remote_code=trust_remote_code)
    loaded = load(path)
    check_positions(loaded, source)
    if tlens_model is None:
        tlens_model = _name_of_model(loaded, source)
    if isinstance(tlens_model, str):
        processing = next(iter(loaded.entries.values())).origin.processing or "raw"
        tlens_model = load_hooked_model(
            tlens_model, None, processing, trust_remote_code=trust_remote_code
        )
    check_model(loaded, tlens_model)
    reads = [entry.read_position for entry in loaded.entries.values()]
    model = SAETransformer(
        tlens_model,
        list(loaded),
        saes=loaded,
        read_positions=None if reads == list(loaded) else reads,
    )
    return model.to(device).eval()


def check_positions(loaded: LoadedSAEs, source: str | Path) -> None:
    """See that the files say where their SAEs belong.

    Raises:
        UserError: They do not.
    """
    for entry in loaded.entries.values():
        if UNKNOWN_POSITION in (entry.position, entry.read_position):
            raise UserError(
                f"{source}: no file says at which hook point the SAE belongs; load it with "
                "sparsify.formats.load, and give it to SAETransformer(model, position, saes=...)"
            )


def check_model(loaded: LoadedSAEs, model: TLensModel) -> None:
    """See that a model has the hook points of SAEs, and was processed as theirs was.

    Raises:
        UserError: It does not, or was not.
    """
    found = processing_of(model)
    for position, entry in loaded.entries.items():
        for name in (entry.read_position, position):
            if name not in model.hook_dict:
                raise UserError(
                    f"the model has no hook point {nearest(name, model.hook_dict)} where the SAE "
                    "belongs; use the model that it was trained in"
                )
        wanted = entry.origin.processing
        if wanted is not None and found is not None and wanted != found:
            raise UserError(
                f"the SAE at {position} was trained on a model with {_WORDS[wanted]}, but this one "
                f"has {_WORDS[found]}, and so other activations; load the model with "
                f"tlens_model_processing: {wanted} ({_CALLS[wanted]})"
            )


_WORDS = {"folded": "folded layer norms and centred weights", "raw": "weights as they are"}
_CALLS: Mapping[str, str] = {
    "folded": "HookedTransformer.from_pretrained",
    "raw": "HookedTransformer.from_pretrained_no_processing",
}


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _name_of_model(loaded: LoadedSAEs, source: str | Path) -> str:
    names = {entry.origin.model_name for entry in loaded.entries.values()}
    if len(names) != 1 or None in names:
        found = ", ".join("none" if name is None else name for name in names)
        raise UserError(f"{source}: the files name no one model ({found}); give it as tlens_model")
    return str(names.pop())
