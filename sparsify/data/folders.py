"""What a folder of data holds: a data set of `datasets`, tables of one format, or texts.

A folder that could be meant in two ways is refused; nothing is chosen silently.
"""

import os
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePath

from sparsify.data.saved_sets import saved_files, saved_splits
from sparsify.data.table_files import format_of
from sparsify.settings.base_config import UserError
from sparsify.settings.files import read_text

# Files that go with tables and are no data. Other files beside tables are a question.
_COMPANION_NAMES = re.compile(
    r"(?i)_[^.]*|.*~|(_success|readme|licen[cs]e|copying|notice|citation|requirements|checksums?"
    r"|(md5|sha\d+)(sums?)?)([\W_].*)?"
)
_COMPANION_SUFFIXES = {
    *(".md", ".rst", ".yaml", ".yml", ".toml", ".lock", ".crc", ".md5", ".sha1", ".sha256"),
    *(".sha512", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".pdf", ".tmp", ".bak", ".idx"),
}
# Texts, but beside tables they describe them.
_PAGES = {".html", ".htm"}
# Texts, but beside parquet or Arrow, which nobody writes by hand, they make or load them.
_PROGRAMS = {".py", ".sh", ".ipynb"}
_METADATA = {
    *("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
}
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True)
class Found:
    """Files of a folder that are read.

    Attributes:
        files: The files, in the order in which they are known.
        is_table: They are tables, of one format, and not texts.
        left_out: What is not read, for the log. Empty: nothing.
    """

    files: tuple[Path, ...]
    is_table: bool
    left_out: str = ""


def look_into(folder: Path, name: str, split: str) -> Found:
    """Return the files of a folder that are a split of its data.

    Args:
        folder: The folder.
        name: What to call it in messages.
        split: The split.

    Raises:
        UserError: It cannot be read, is ambiguous, is damaged, or has no such split.
    """
    if (saved := saved_splits(folder, name)) is not None:
        return Found(saved_files(_chosen(saved, split, name), name), is_table=True)
    files, others = _walk(folder, name)
    tables, left_out = _tables(folder, files, name)
    if not tables:
        csv = [path for path in files if format_of(path) == "csv"]
        if csv and all(path in csv or _is_companion(path) for path in files):
            raise UserError(csv_refusal(csv[0]))
        return Found(tuple(files), is_table=False, left_out=_count_others(others))
    if missing := [path for path in others if format_of(path) is not None]:
        raise UserError(
            f"dataset_name: '{missing[0]}', a file of '{name}', is a broken link, a pipe or a "
            f"device; restore or remove it"
        )
    _check_card(folder, name)
    splits = _by_split([path.relative_to(folder) for path in tables], name)
    chosen = _chosen(splits, split, name)
    left_out = [path.relative_to(folder) for path in left_out]
    said = ", ".join(filter(None, [_count(left_out), _count_others(others)]))
    return Found(tuple(folder / path for path in chosen), is_table=True, left_out=said)


def describe(files: Sequence[Path], left_out: str = "", n_rows: int | None = None) -> str:
    """Return what files are read, and what is left out, in a line for the log."""
    rows = "" if n_rows is None else f", {n_rows:,} rows"
    end = f"; left out: {left_out}" if left_out else ""
    return f"{_count(files)}{rows}{end}"


def csv_refusal(path: Path) -> str:
    """Return the message on a table of comma-separated values."""
    return (
        f"dataset_name: '{path}' is a table of comma-separated values, which is not read; convert "
        f"it to parquet or jsonl, or, if it is meant as plain text, name it .txt"
    )


def _walk(folder: Path, name: str) -> tuple[list[Path], list[Path]]:
    """Files below a folder that are not hidden, and what stands there and is no file."""

    def fail(error: OSError) -> None:
        raise UserError(
            f"dataset_name: '{error.filename}', a folder of '{name}', cannot be read "
            f"({error.strerror}); make it readable, or name another folder"
        )

    files: list[Path] = []
    others: list[Path] = []
    for where, folders, names in os.walk(folder, onerror=fail):
        others += [Path(where, sub) for sub in folders if os.path.islink(Path(where, sub))]
        folders[:] = [sub for sub in folders if not sub.startswith(".")]
        for path in (Path(where, file) for file in names if not file.startswith(".")):
            (files if os.path.isfile(path) else others).append(path)
    return sorted(files), others


def _tables(folder: Path, files: list[Path], name: str) -> tuple[list[Path], list[Path]]:
    """Files that are tables, and those that are left out beside them. No tables: it is texts."""
    below = [path for path in files if not _is_private(path.relative_to(folder))]
    named = {path: format_of(path) for path in below if path.name not in _METADATA}
    formats = set(named.values()) & {"parquet", "json lines", "arrow"}
    if not formats and all(kind == "json" or _is_companion(path) for path, kind in named.items()):
        # Source trees hold JSON too; it is a table only where there is nothing else.
        formats = {"json"} & set(named.values())
    if "json lines" in formats:
        formats.add("json")
    tables = [path for path, kind in named.items() if kind in formats]
    rest = [path for path in files if path not in set(tables)]
    strange = [
        path
        for path in rest
        if path in named and not (_goes_with(path, formats) or named[path] == "json")
    ]
    if len(formats - {"json"}) > 1 or (tables and strange):
        raise UserError(
            f"dataset_name: '{name}' holds {_count(tables + strange)}, and it is not clear which "
            f"are meant; name one file, as '{tables[0]}', or a folder with files of one format"
        )
    # In the order of their names as `datasets` has it, which orders of rows depend on.
    return sorted(tables, key=str), rest


def _is_private(path: PurePath) -> bool:
    return any(part.startswith("__") for part in path.parts[:-1])


def _goes_with(path: Path, formats: Set[str | None]) -> bool:
    allows_programs = not formats & {"json lines", "json"}
    texts = _PAGES | _PROGRAMS if allows_programs else _PAGES
    return _is_companion(path) or path.suffix.lower() in texts


def _is_companion(path: Path) -> bool:
    if path.name in _METADATA:
        return True
    is_named = _COMPANION_NAMES.fullmatch(path.name) is not None
    return path.suffix.lower() in _COMPANION_SUFFIXES or (is_named and format_of(path) is None)


def _count(paths: Sequence[PurePath]) -> str:
    """Count files by their suffix, the three most frequent ones; one of a kind is named."""
    by_suffix: dict[str, list[PurePath]] = {}
    for path in paths:
        by_suffix.setdefault(path.suffix.lower(), []).append(path)
    ranked = sorted(by_suffix.items(), key=lambda item: (-len(item[1]), item[0]))
    said = [
        found[0].name if len(found) == 1 else f"{len(found):,} {suffix or 'without suffix'}"
        for suffix, found in ranked[:3]
    ]
    n_more = sum(len(found) for _, found in ranked[3:])
    return ", ".join(said + [f"{n_more:,} more"] * (n_more > 0))


def _count_others(others: Sequence[Path]) -> str:
    if len(others) == 1:
        return f"{others[0].name} (not a file)"
    return f"{len(others):,} links, pipes or devices" if others else ""


# Splits


def _chosen(splits: dict[str, list[Path]], split: str, name: str) -> list[Path]:
    if split not in splits:
        raise UserError(
            f"split: '{name}' has no split '{split}'; use one of {', '.join(sorted(splits))}"
        )
    return splits[split]


def _by_split(paths: list[Path], name: str) -> dict[str, list[Path]]:
    """Paths by the split that their names say, as `datasets` has it; all are `train` if none do."""
    for says in (_splits_of_shard, _splits_of_folders, _splits_of_name):
        found = {path: says(path) for path in paths}
        if any(found.values()):
            break
    else:
        return {"train": paths}
    unclear = [path for path, splits in found.items() if len(splits) != 1]
    if unclear:
        other = next(path for path, splits in found.items() if splits)
        raise UserError(
            f"dataset_name: '{name}' has files of splits, as '{other}', but '{unclear[0]}' "
            f"belongs to {'two' if found[unclear[0]] else 'none'}; name one file, or rename it "
            f"to train-..., validation-... or test-..."
        )
    by_split: dict[str, list[Path]] = {}
    for path, (split,) in found.items():
        by_split.setdefault(split, []).append(path)
    return by_split


def _splits_of_shard(path: Path) -> set[str]:
    found = re.match(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}", path.name)
    return {found[1]} if found and path.parts[:-1] == ("data",) else set()


def _splits_of_folders(path: Path) -> set[str]:
    return {split for part in path.parts[:-1] for split in _split_words(part)}


def _splits_of_name(path: Path) -> set[str]:
    return set(_split_words(path.name))


def _split_words(text: str) -> Iterator[str]:
    words = re.split(r"[-._ 0-9]+", text.lower())
    return (_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS)


def _check_card(folder: Path, name: str) -> None:
    """Refuse a copy of a data set of the hub whose card names several subsets."""
    try:
        card = read_text(folder / "README.md")
    except (OSError, UnicodeDecodeError):
        return
    configs = re.search(r"\A---\n(?:.*\n)*?configs:\n((?:[ -].*\n)+)(?:.*\n)*?---", card)
    subsets = re.findall(r"config_name:\s*(\S+)", configs[1]) if configs else []
    if len(subsets) > 1:
        raise UserError(
            f"dataset_name: '{name}' holds several subsets, as its README.md says "
            f"({', '.join(subsets[:9])}); name the folder or the file of one"
        )
