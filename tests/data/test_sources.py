import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from sparsify.data import sources
from sparsify.data.config import DataConfig
from sparsify.data.sources import open_documents
from sparsify.settings.base_config import UserError


def read(name: Path | str, **fields: Any) -> list[Any]:
    """The documents that a config names, sorted."""
    documents = open_documents(DataConfig(dataset_name=str(name), n_ctx=4, **fields))
    chunks = documents.chunks(np.random.default_rng(0), None)
    return sorted(document for chunk in chunks for document in chunk.documents)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_parquet(path: Path) -> None:
    Dataset.from_dict({"text": ["a", "b", "c"], "ids": [[1, 2, 3, 4]] * 3}).to_parquet(path)


def test_file_is_read_whatever_the_card_of_its_folder_says(tmp_path: Path):
    write_parquet(tmp_path / "t.parquet")
    Dataset.from_dict({"text": ["v"]}).to_parquet(tmp_path / "other.parquet")
    card = "---\nconfigs:\n- config_name: x\n  data_files: other.parquet\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert read(tmp_path / "t.parquet") == ["a", "b", "c"]


def write_jsonl(path: Path) -> None:
    rows = [{"text": text, "ids": [1, 2, 3, 4]} for text in "abc"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("name", "write"),
    [("t.parquet", write_parquet), ("t.jsonl", write_jsonl), ("t.json", write_jsonl)],
)
def test_tables_are_read_from_files_and_folders(
    name: str, write: Callable[[Path], None], streaming: bool, tmp_path: Path
):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / name)
    (folder / ".hidden.txt").write_text("hidden")
    assert read(folder / name, streaming=streaming) == ["a", "b", "c"]
    assert read(folder, streaming=streaming) == ["a", "b", "c"]
    ids = read(folder / name, streaming=streaming, is_tokenized=True, column_name="ids")
    assert ids == [[1, 2, 3, 4]] * 3


def test_folder_of_tables_has_the_splits_that_its_file_names_say(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_parquet(folder / "train.parquet")
    Dataset.from_dict({"text": ["v"]}).to_parquet(folder / "validation.parquet")
    assert read(folder, split="validation") == ["v"]
    assert read(folder, split="train") == ["a", "b", "c"]


def test_text_file_is_one_document_and_a_folder_has_one_per_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a\n\na")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.py").write_text("b")
    (tmp_path / "sub" / "c.json").write_text("{}")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    assert read(tmp_path / "a.txt") == ["a\n\na"]
    assert read(tmp_path) == ["a\n\na", "b", "{}"]


def test_python_stdlib_has_this_library():
    assert any("class JSONDecoder" in text for text in read("python-stdlib"))


@pytest.mark.parametrize("name", ["./no", "/no", "~/no", "a/b/c", "a/b.parquet", "no.txt"])
def test_missing_path_is_not_looked_for_on_the_hub(name: str):
    shown = os.path.expanduser(name)
    with pytest.raises(UserError, match=f"dataset_name: there is no file or folder '{shown}'"):
        read(name)


def test_failure_of_the_hub_is_one_message(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(sources, "load_dataset", fail)
    message = "'user/name' \\(split 'train'\\) cannot be read: Couldn't reach the hub; check name,"
    with pytest.raises(UserError, match=message):
        read("user/name")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"column_name": "txt"}, "column_name: .* has no column 'txt'; set it to one of text, ids"),
        ({"is_tokenized": True}, "has no column 'input_ids'; set it to one of text, ids"),
        (
            {"column_name": "ids"},
            "is_tokenized: column 'ids' of .* holds lists of int(64)?, not text; set is_token",
        ),
        (
            {"is_tokenized": True, "column_name": "text"},
            "column 'text' of .* holds text, not lists of token ids; set is_tokenized: false",
        ),
        ({"split": "test"}, "split: a file has no split 'test' .*; remove the setting, and name"),
        ({"subset": "en"}, "subset: 'en' has no meaning for local files; remove it"),
    ],
)
@pytest.mark.parametrize("name", ["table.parquet", "table.jsonl"])
def test_bad_table_settings_are_rejected(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
):
    write_parquet(tmp_path / "table.parquet")
    write_jsonl(tmp_path / "table.jsonl")
    with pytest.raises(UserError, match=message):
        read(tmp_path / name, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "validation"}, "split: text files have no split 'validation' .*; remove the"),
        ({"column_name": "text"}, "column_name: text: has no meaning for text files .*; remove it"),
        ({"is_tokenized": True}, "is_tokenized: True: has no meaning for text files"),
    ],
)
def test_settings_of_tables_are_rejected_for_text(
    fields: dict[str, Any], message: str, source_tree: Path
):
    with pytest.raises(UserError, match=message):
        read(source_tree, **fields)


@pytest.mark.parametrize("name", ["e.parquet", "e.jsonl", "e.txt", "folder"])
def test_empty_data_are_rejected(name: str, tmp_path: Path):
    (tmp_path / "folder").mkdir() if name == "folder" else (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"dataset_name: '.*{name}' is empty; name"):
        read(tmp_path / name)


def test_table_without_rows_is_rejected(tmp_path: Path):
    Dataset.from_dict({"text": ["a"]}).select([]).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"dataset_name: '.*t.parquet' is empty"):
        read(tmp_path / "t.parquet")


def test_damaged_table_is_one_message(tmp_path: Path):
    (tmp_path / "t.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"dataset_name: '.*t.parquet' cannot be read: .*; replace"):
        read(tmp_path / "t.parquet")
