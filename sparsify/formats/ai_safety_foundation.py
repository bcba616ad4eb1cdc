"""ai-safety-foundation's sparse_autoencoder: one file that is a pickle of its own classes.

Reading it would execute what the pickle names, so it is not read. The message has the lines that
save its tensors, and that run where the package is installed and the file is trusted.
"""

import zipfile
from pathlib import Path

from sparsify.formats.loaded import LoadedSAE
from sparsify.settings.base_config import UserError
from sparsify.settings.files import open_regular

NAME = "ai-safety-foundation"
CLASS = b"sparse_autoencoder.autoencoder.model"
MAX_PICKLE_BYTES = 1_000_000


def recognises(path: Path) -> bool:
    """Return whether a file names the classes of this package."""
    if path.suffix != ".pt" or not path.is_file():
        return False
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return any(CLASS in archive.open(name).read(MAX_PICKLE_BYTES) for name in names)
    # What zipfile raises for files that are no zip, damaged, encrypted or compressed in other ways.
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return False


def read(path: Path) -> list[LoadedSAE]:
    """Say how the file is converted.

    Raises:
        UserError: Always.
    """
    raise UserError(
        f"{path}: is a pickle of {NAME}'s classes, which would execute code, so it is not read. If "
        "you trust it, convert it where that package is installed:\n"
        "    import torch; from safetensors.torch import save_file\n"
        f"    state = torch.load('{path.name}', weights_only=False).state_dict\n"
        "    save_file({'W_enc': state['encoder.weight'].T.contiguous(), 'b_enc': "
        "state['encoder.bias'],\n"
        "               'W_dec': state['decoder.weight'].T.contiguous(), 'b_dec': "
        "state['tied_bias']}, 'sae_weights.safetensors')\n"
        'and put a cfg.json beside it, as SAELens does: {"architecture": "standard", '
        '"apply_b_dec_to_input": true, "metadata": {"hook_name": ...}}'
    )
