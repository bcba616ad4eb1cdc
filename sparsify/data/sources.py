"""Finds the documents that a `DataConfig` names, and refuses what cannot be read."""

import os
import pkgutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets.config
from datasets import Dataset, load_dataset, packaged_modules
from huggingface_hub import constants as hub

from sparsify.data.config import PYTHON_STDLIB, DataConfig, table_settings
from sparsify.data.documents import CHUNK_DOCUMENTS, TableRows, TextFiles, wrong_kind
from sparsify.data.folders import csv_refusal, describe, look_into
from sparsify.data.local_table import LocalTable, cached
from sparsify.data.python_stdlib import iter_files
from sparsify.data.table_files import Head, format_of, read_head
from sparsify.data.tokens import check_length
from sparsify.settings.base_config import UserError
from sparsify.settings.secrets import one_line

_MAX_SHARDS = 1024
_MAX_HEADS = 1000
_TEXT_SUFFIXES = {".txt", ".md", ".py", ".gz", ".zst", ".bz2"}


def open_documents(config: DataConfig) -> TextFiles | TableRows:
    """Return the documents of `config`; the first row of a table has been looked at.

    Raises:
        UserError: There is nothing there, or not what the config says.
    """
    name = config.dataset_name
    if name == PYTHON_STDLIB:
        files = iter_files("validation" if config.split == "validation" else "train")
        return TextFiles(files, skip_binary=True, found=describe(files))
    # Unlike their like in pathlib, these raise nothing for a name that no path can have.
    path = Path(name)
    if os.path.isdir(path):
        found = look_into(path, name, config.split)
        if found.is_table:
            return _open_local_table(config, found.files, found.left_out)
        return _open_texts(config, found.files, found.left_out, is_folder=True)
    if os.path.lexists(path):
        if format_of(path) == "csv":
            raise UserError(csv_refusal(path))
        if format_of(path) is not None:
            return _open_local_table(config, [path], "")
        return _open_texts(config, [path], "", is_folder=False)
    if _looks_like_path(name):
        raise UserError(
            f"dataset_name: there is no file or folder '{name}' "
            f"(looked at {path.absolute()}); check the path"
        )
    return _open_hub_table(config)


def _looks_like_path(name: str) -> bool:
    has_suffix = format_of(Path(name)) is not None or Path(name).suffix.lower() in _TEXT_SUFFIXES
    return name[:1] in {".", "/", "~"} or name.count("/") > 1 or "\\" in name or has_suffix


# Texts


def _open_texts(
    config: DataConfig, paths: Sequence[Path], left_out: str, *, is_folder: bool
) -> TextFiles:
    name = config.dataset_name
    if config.split != "train":
        raise UserError(
            f"split: text files have no split '{config.split}' ({name}); remove "
            f"the setting, and name another file or folder in dataset_name for other data"
        )
    if settings := table_settings(config):
        raise UserError(
            f"{settings}: has no meaning for text files ({name}); remove it, or "
            f"use a parquet or jsonl file"
        )
    files = TextFiles(paths, skip_binary=is_folder)
    if not is_folder:
        files.check()
    if not any(path.stat().st_size for path in paths):
        raise UserError(f"dataset_name: '{name}' is empty; name a file or folder with text")
    said = f"texts: {describe(paths, left_out)}"
    return replace(
        files, found=f"{said}; files that are not UTF-8 are left out" if is_folder else said
    )


# Tables


def _open_local_table(config: DataConfig, files: Sequence[Path], left_out: str) -> TableRows:
    name = config.dataset_name
    if config.subset is not None:
        raise UserError(f"subset: '{config.subset}' has no meaning for local files; remove it")
    if config.split != "train" and len(files) == 1 and files[0] == Path(name):
        raise UserError(
            f"split: a file has no split '{config.split}' ({name}); remove the setting, and name "
            f"another file in dataset_name for other data"
        )
    heads = [_head(path, config, len(files)) for path in files[:_MAX_HEADS]]
    for path, head in zip(files, heads, strict=False):
        _check_head(config, name if len(files) == 1 else f"{path}", head)
    counts = [head.n_rows for head in heads if head.n_rows is not None]
    n_rows = sum(counts) if len(counts) == len(files) else None
    table = LocalTable(files, config.column)
    rows = TableRows(
        table,
        config.column,
        config.is_tokenized,
        name,
        tuple(map(str, files)),
        f"table: {describe(files, left_out, n_rows)}",
    )
    _check_first_row(config, rows, rows.first_row())
    if config.streaming:
        return rows
    try:
        copy = cached(
            table,
            is_tokenized=config.is_tokenized,
            rows_per_shard=CHUNK_DOCUMENTS,
            max_shards=_MAX_SHARDS,
        )
    # `datasets` wraps whatever reading or writing raises.
    except Exception as error:
        reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise UserError(_refusal(config, reason, "replace the damaged file")) from error
    return replace(rows, dataset=copy, files=())


def _head(path: Path, config: DataConfig, n_files: int) -> Head:
    name = config.dataset_name
    try:
        return read_head(path)
    # pyarrow, JSON and files have errors of many kinds; all mean that it cannot be read.
    except Exception as error:
        what, is_empty = f"dataset_name: '{name}'", path.is_file() and path.stat().st_size == 0
        if n_files > 1:
            what = f"dataset_name: '{path}', a file of '{name}',"
        elif is_empty:
            raise UserError(f"{what} is empty; name data with at least one row") from error
        # The system's words without the number of the error and the name of the file.
        words = getattr(error, "strerror", None)
        reason = "it is empty" if is_empty else words or one_line(error)
        remedy = "make it readable" if words else "replace the damaged file"
        raise UserError(f"{what} cannot be read: {reason}; {remedy}, or remove it") from error


def _check_head(config: DataConfig, name: str, head: Head) -> None:
    if not head.columns:  # JSON without a row
        return
    if config.column not in head.columns:
        raise UserError(
            f"column_name: '{name}' has no column '{config.column}'; "
            f"set it to one of {', '.join(head.columns)}"
        )
    kind = head.columns[config.column]
    wanted = ("lists of int", "lists of uint") if config.is_tokenized else ("text",)
    if not kind.startswith((*wanted, "nothing")):
        raise UserError(wrong_kind(config.column, name, kind, is_tokenized=config.is_tokenized))


def _check_first_row(config: DataConfig, rows: TableRows, row: dict[str, Any] | None) -> None:
    name = config.dataset_name
    if row is None:
        raise UserError(f"dataset_name: '{name}' is empty; name data with at least one row")
    for document in rows.contents(row):
        if config.is_tokenized:
            check_length(len(document), config.n_ctx, name)


# Tables of the hub


def _open_hub_table(config: DataConfig) -> TableRows:
    name = config.dataset_name
    # Asked for by the name of a format, `datasets` would read the working directory.
    if name in {module.name for module in pkgutil.iter_modules(packaged_modules.__path__)}:
        raise UserError(
            f"dataset_name: '{name}' is a format of data, not data; name a file or a folder"
        )
    try:
        dataset = load_dataset(name, config.subset, split=config.split, streaming=config.streaming)
        if isinstance(dataset, Dataset):
            n_shards = min(_MAX_SHARDS, max(1, len(dataset) // CHUNK_DOCUMENTS))
            dataset = dataset.to_iterable_dataset(num_shards=n_shards)
        first_row = next(iter(dataset.take(1)), None)
    # `datasets` passes on the errors of the hub client, the network, the file system, pyarrow and
    # its own; all mean that the data named by the person cannot be read.
    except Exception as error:
        remedy = "check name, split, subset and network; there is no such local file or folder"
        raise UserError(_refusal(config, error, remedy)) from error
    _check_head(config, name, Head(dict.fromkeys(first_row or (), "nothing"), None))
    rows = TableRows(
        dataset.select_columns([config.column]),
        config.column,
        config.is_tokenized,
        name,
        found="a data set of the hub",
    )
    _check_first_row(config, rows, first_row)
    return rows


def _refusal(config: DataConfig, error: Exception, remedy: str) -> str:
    what = f"dataset_name: '{config.dataset_name}' (split '{config.split}') cannot be read"
    if (cache := _unwritable_cache(error)) is not None:
        return f"{what}: {cache}"
    return f"{what}: {one_line(error)}; {remedy}"


def _unwritable_cache(error: Exception) -> str | None:
    """Return the message on a cache that cannot be written. None: that is not the cause."""
    causes = [error, error.__cause__, error.__context__]
    for cause in causes:
        if not isinstance(cause, OSError) or not isinstance(cause.filename, str):
            continue
        for variable, folder in (
            ("HF_DATASETS_CACHE", str(datasets.config.HF_DATASETS_CACHE)),
            ("HF_HUB_CACHE", hub.HF_HUB_CACHE),
            ("HF_HOME", hub.HF_HOME),
        ):
            # The folder itself, what is in it, or the one that it should be made in.
            if (
                Path(folder) in (path := Path(cause.filename), *path.parents)
                or path in Path(folder).parents
            ):
                return (
                    f"the cache folder '{folder}' cannot be used ({cause.strerror}: "
                    f"'{cause.filename}'); make it writable, or set {variable} to another folder"
                )
    return None
