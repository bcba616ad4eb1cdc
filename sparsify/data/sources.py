"""Finds the documents that a `DataConfig` names, and refuses what cannot be read."""

import os
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder

from sparsify.data.config import PYTHON_STDLIB, DataConfig, table_settings
from sparsify.data.documents import CHUNK_DOCUMENTS, Documents, TableRows, TextFiles
from sparsify.data.python_stdlib import iter_files
from sparsify.data.tokens import check_length
from sparsify.settings.base_config import UserError
from sparsify.settings.secrets import one_line

_TABLE_SUFFIXES = {".parquet", ".jsonl", ".json"}
_MAX_SHARDS = 1024


def open_documents(config: DataConfig) -> Documents:
    """Return the documents of `config`; the first row of a table has been looked at.

    Raises:
        UserError: There is nothing there, or not what the config says.
    """
    if config.dataset_name == PYTHON_STDLIB:
        split = "validation" if config.split == "validation" else "train"
        return TextFiles(iter_files(split), skip_binary=True)
    # Unlike their like in pathlib, these raise nothing for a name that no path can have.
    path = Path(os.path.expanduser(config.dataset_name))
    if os.path.isdir(path):
        return _open_folder(config, path)
    if os.path.exists(path):
        if path.suffix in _TABLE_SUFFIXES:
            return _open_table(config, path)
        return _text_files(config, [path], skip_binary=False)
    if _looks_like_path(config.dataset_name):
        raise UserError(
            f"dataset_name: there is no file or folder '{config.dataset_name}' "
            f"(looked at {path.absolute()}); check the path"
        )
    return _open_table(config, None)


def _looks_like_path(name: str) -> bool:
    known_suffix = Path(name).suffix in {*_TABLE_SUFFIXES, ".txt", ".md", ".py", ".csv", ".arrow"}
    return name[:1] in {".", "/", "~"} or name.count("/") > 1 or "\\" in name or known_suffix


def _open_folder(config: DataConfig, folder: Path) -> Documents:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    suffixes = {path.suffix for path in files}
    # Source trees hold json files too; only a folder of nothing else is a table of json.
    if suffixes & {".parquet", ".jsonl"} or suffixes == {".json"}:
        return _open_table(config, folder)
    return _text_files(config, files, skip_binary=True)


def _text_files(config: DataConfig, paths: list[Path], skip_binary: bool) -> TextFiles:
    if config.split != "train":
        raise UserError(
            f"split: text files have no split '{config.split}' ({config.dataset_name}); remove "
            f"the setting, and name another file or folder in dataset_name for other data"
        )
    if settings := table_settings(config):
        raise UserError(
            f"{settings}: has no meaning for text files ({config.dataset_name}); remove it, or "
            f"use a parquet or jsonl file"
        )
    if not any(path.stat().st_size for path in paths):
        raise UserError(
            f"dataset_name: '{config.dataset_name}' is empty; name a file or folder with text"
        )
    return TextFiles(paths, skip_binary)


def _open_table(config: DataConfig, path: Path | None) -> TableRows:
    """A table in local files, or, without a path, of the hub."""
    name = config.dataset_name
    if path is not None and config.subset is not None:
        raise UserError(f"subset: '{config.subset}' has no meaning for local files; remove it")
    try:
        dataset, files = _load(config, path)
        first_row = next(iter(dataset.take(1)), None)
    # `datasets` passes on the errors of the hub client, the network, the file system, pyarrow and
    # its own; all mean that the data named by the person cannot be read.
    except Exception as error:
        raise UserError(_refusal(config, path, error)) from error
    if first_row is None:
        raise UserError(f"dataset_name: '{name}' is empty; name data with at least one row")
    if config.column not in first_row:
        raise UserError(
            f"column_name: '{name}' has no column '{config.column}'; "
            f"set it to one of {', '.join(first_row)}"
        )
    rows = TableRows(
        dataset.select_columns([config.column]), config.column, config.is_tokenized, name, files
    )
    for document in rows.contents(first_row):
        if config.is_tokenized:
            check_length(len(document), config.n_ctx, name)
    return rows


def _load(config: DataConfig, path: Path | None) -> tuple[IterableDataset, tuple[str, ...]]:
    """Return the table, and the local files that are its shards, if they are."""
    if path is None:
        where, data_files = config.dataset_name, None
    elif path.is_dir():
        where, data_files = str(path.absolute()), None
    else:
        # As a file of its folder: asked for by its format, `datasets` would call home.
        where, data_files = str(path.absolute().parent), path.name
    dataset = load_dataset(
        where, config.subset, data_files=data_files, split=config.split, streaming=config.streaming
    )
    if isinstance(dataset, Dataset):
        n_shards = min(_MAX_SHARDS, max(1, len(dataset) // CHUNK_DOCUMENTS))
        return dataset.to_iterable_dataset(num_shards=n_shards), ()
    if path is None:
        return dataset, ()
    builder = load_dataset_builder(where, data_files=data_files)
    files = (builder.config.data_files or {}).get(config.split, [])
    return dataset, tuple(map(str, files))


def _refusal(config: DataConfig, path: Path | None, error: Exception) -> str:
    if path is not None and path.is_file() and path.stat().st_size == 0:
        return f"dataset_name: '{config.dataset_name}' is empty; name data with at least one row"
    reason = one_line(error)
    if path is not None:
        remedy = "check the file and the split"
    else:
        remedy = "check name, split, subset and network; there is no such local file or folder"
    what = f"dataset_name: '{config.dataset_name}' (split '{config.split}') cannot be read"
    return f"{what}: {reason}; {remedy}"
