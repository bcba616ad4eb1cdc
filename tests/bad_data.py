"""Data that are damaged or ambiguous, for `test_bad_input.py`; more are in `data/test_odd_data.py`.

`FILES` stands for the folder that `make_bad_files.py` fills.
"""

from collections.abc import Mapping
from typing import Any


def _text(name: str) -> dict[str, Any]:
    return {"train_data.dataset_name": f"FILES/data/{name}"}


DATA: dict[str, tuple[Mapping[str, Any], str]] = {
    "path that looks like a pattern": (
        _text("*.jsonl"),
        "there is no file or folder 'FILES/data/*.jsonl' (looked at",
    ),
    "table of commas": (_text("a.csv"), "FILES/data/a.csv' is a table of comma-separated values"),
    "tables of two formats": (_text("mixed"), "'FILES/data/mixed' holds a.jsonl, b.parquet, and"),
    "a split and more": (_text("splits"), "as 'train.jsonl', but 'more.jsonl' belongs to none; n"),
    "saved data without a shard": (_text("saved"), "data-00001-of-00002.arrow' is missing or dama"),
    "pipe for a table": (_text("pipe.jsonl"), "it is a pipe or a device, not a file; make it rea"),
    "rows of other bytes": (_text("bytes.jsonl"), "line 1 is not UTF-8 (invalid start byte); repl"),
    "name of a format": (
        {"train_data.dataset_name": "parquet"},
        "'parquet' is a format of data, not data; name a file or a folder",
    ),
    "tokenizer without an end of text": (
        {"train_data.tokenizer_name": "FILES/data/no_end"},
        "'FILES/data/no_end' has no end-of-text token of its own to put between documents; set",
    ),
    "tokenizer without a beginning": (
        {"train_data.tokenizer_name": "FILES/data/no_bos", "train_data.add_bos_token": True},
        "add_bos_token: 'FILES/data/no_bos' has no BOS token of its own; set add_bos_token: fal",
    ),
}
