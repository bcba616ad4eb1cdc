"""The files of a run that was logged to wandb: its config and its newest weights."""

import tempfile
from pathlib import Path
from typing import Any

from sparsify.runs.run_folder import CONFIG_FILE
from sparsify.runs.weight_files import WEIGHTS_NAME
from sparsify.settings.base_config import UserError
from sparsify.settings.secrets import one_line


def download_run(run_id: str, cache: Path) -> Path:
    """Return a folder with the config and the newest weights of a run, downloaded if not there.

    Args:
        run_id: `entity/project/run_id`.
        cache: Folder below which runs are kept.

    Raises:
        UserError: There is no such run, it has no such files, or wandb cannot be reached.
    """
    try:
        import wandb

        files = {file.name: file for file in wandb.Api().run(run_id).files()}
        # Names are those of others: only these two kinds of plain ones are written.
        weights = {name: int(match[1]) for name in files if (match := WEIGHTS_NAME.fullmatch(name))}
        if not weights or CONFIG_FILE not in files:
            raise UserError(
                f"wandb:{run_id}: the run has no {CONFIG_FILE} or no samples_N.pt; give one that "
                "trained SAEs and uploaded them"
            )
        folder = cache / "wandb" / run_id
        for name in (CONFIG_FILE, max(weights, key=weights.__getitem__)):
            if not (folder / name).is_file():
                _download(files[name], folder)
    except UserError:
        raise
    # The client passes on whatever went wrong below it.
    except Exception as error:
        raise UserError(
            f"wandb:{run_id}: cannot be had ({one_line(error)[:300]}); check the name, the network "
            "and WANDB_API_KEY, or download its files and give their folder"
        ) from error
    return folder


def _download(file: Any, folder: Path) -> None:  # a file of wandb's client
    folder.mkdir(parents=True, exist_ok=True)
    # A download that ends early must not be taken for the file the next time.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        file.download(root=temporary)
        (Path(temporary) / file.name).replace(folder / file.name)
