"""Data sets that `datasets` has saved to disk: which files hold a split."""

import json
from pathlib import Path

from sparsify.settings.base_config import UserError
from sparsify.settings.files import read_text


def saved_splits(folder: Path, name: str) -> dict[str, list[Path]] | None:
    """Return the folders of a data set of `save_to_disk`, by split. None: it is something else.

    Raises:
        UserError: It is one, of which a part is missing or damaged.
    """
    if (folder / "dataset_dict.json").exists():
        content = _metadata(folder / "dataset_dict.json", name)
        splits = content.get("splits")
        if not isinstance(splits, list) or not all(_is_plain_name(key) for key in splits):
            raise UserError(_damaged(folder / "dataset_dict.json", name, "it lists no splits"))
        return {key: [folder / key] for key in splits}
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        content = _metadata(folder / "state.json", name)
        # A single data set is one split, whatever it was part of.
        return {"train": [folder], str(content.get("_split") or "train"): [folder]}
    below = [path.parent for path in folder.glob("*/state.json")]
    is_part = (folder / "dataset_info.json").exists() and any(folder.glob("data-*.arrow"))
    if is_part or any((path / "dataset_info.json").exists() for path in below):
        missing = "state.json" if is_part else "dataset_dict.json"
        raise UserError(_damaged(folder / missing, name, "there is no such file"))
    return None


def saved_files(folders: list[Path], name: str) -> tuple[Path, ...]:
    """Return the files of a split.

    Args:
        folders: The folder of the split, as `saved_splits` gives it.
        name: What to call the data set in messages.

    Raises:
        UserError: One is missing, or their list is damaged.
    """
    [folder] = folders
    state = folder / "state.json"
    listed = _metadata(state, name).get("_data_files")
    names = [file.get("filename") for file in listed] if isinstance(listed, list) else []
    if not names or not all(_is_plain_name(file) for file in names):
        raise UserError(_damaged(state, name, "it lists no files"))
    files = tuple(folder / str(file) for file in names)
    for path in files:
        if not path.is_file():
            raise UserError(_damaged(path, name, "there is no such file"))
    return files


def _is_plain_name(name: object) -> bool:
    # Also one that leads out of the folder would be read.
    return isinstance(name, str) and name not in {"", ".", ".."} and Path(name).name == name


def _metadata(path: Path, name: str) -> dict[str, object]:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise UserError(_damaged(path, name, reason)) from error
    if not isinstance(content, dict):
        raise UserError(_damaged(path, name, "it is not a JSON object"))
    return content


def _damaged(path: Path, name: str, reason: str) -> str:
    return (
        f"dataset_name: '{name}' is a data set of save_to_disk, but '{path}' is missing or damaged "
        f"({reason}); copy the folder again"
    )
