"""Files and folders that are hostile, damaged or ambiguous: read as what they are, or refused."""

import bz2
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from sparsify.data import json_files, limits, sources, table_files
from sparsify.data.config import DataConfig
from sparsify.data.loader import build_loader
from sparsify.data.sources import open_documents
from sparsify.settings.base_config import UserError

pytestmark = pytest.mark.fault

Files = dict[str, str | bytes]


def opened(name: Path | str, **fields: Any) -> Any:
    return open_documents(DataConfig(dataset_name=str(name), n_ctx=4, **fields))


def read(name: Path | str, **fields: Any) -> list[Any]:
    """The documents that a config names, sorted."""
    chunks = opened(name, **fields).chunks(np.random.default_rng(0), None)
    return sorted(document for chunk in chunks for document in chunk.documents)


def refusal(name: Path | str, **fields: Any) -> str:
    with pytest.raises(UserError) as error:
        read(name, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def parquet(*texts: str | None, column: str = "text") -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({column: list(texts)}), buffer)
    return buffer.getvalue().to_pybytes()


def arrow(new: Callable[[Any, pa.Schema], Any], *texts: str) -> bytes:
    table, buffer = pa.table({"text": list(texts)}), pa.BufferOutputStream()
    with new(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return buffer.getvalue().to_pybytes()


def compressed(sink: Any, schema: pa.Schema) -> Any:
    return pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))


def arrow_stream(*texts: str) -> bytes:
    return arrow(pa.ipc.new_stream, *texts)


def zstd(text: str) -> bytes:
    return pa.Codec("zstd").compress(text.encode(), asbytes=True)


J, P = jsonl("a"), parquet("b")


def write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


# A path is taken literally

NAMES = [
    *("train[1]", "train[!1]", "*", "**", "t*", "tr?in1", "{train1,x}", "a b", "50%", "%31", "#1"),
    *("ünï", "日本", "-x", "a::b", "hf:x", "a'b", 'a"b', "a\\b", "$HOME", "a&b=c", "train1."),
    *("a\nb", "file:", "[[x]]", "train@1"),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_literal(name: str, tmp_path: Path):
    neighbours = {
        f"{stem}{end}": jsonl("other") for stem in ("train1", "a", "t") for end in ("", "/x.jsonl")
    }
    write(
        tmp_path,
        {key + (".jsonl" if "/" not in key else ""): text for key, text in neighbours.items()},
    )
    write(
        tmp_path, {f"{name}.jsonl": jsonl("j"), f"{name}.parquet": parquet("p"), f"{name}.txt": "t"}
    )
    write(tmp_path / f"{name}.d", {f"{name}.jsonl": jsonl("d"), f"{name}2.jsonl": jsonl("e")})
    assert read(tmp_path / f"{name}.jsonl") == ["j"]
    assert read(tmp_path / f"{name}.parquet") == ["p"]
    assert read(tmp_path / f"{name}.txt") == ["t"]
    assert read(tmp_path / f"{name}.d") == ["d", "e"]


def test_names_are_literal_where_the_cache_is_used_and_relative_to_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, {"t[1].jsonl": jsonl("mine"), "t1.jsonl": jsonl("other")})
    monkeypatch.chdir(tmp_path)
    assert read("t[1].jsonl", streaming=False) == ["mine"]
    (tmp_path / "t[1].jsonl").write_text(jsonl("changed"))
    assert read("t[1].jsonl", streaming=False) == ["changed"]


@pytest.mark.parametrize("streaming", [True, False])
def test_local_data_need_no_network(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[object] = []

    def note(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise OSError("there is no network")

    for name in ("socket.getaddrinfo", "socket.create_connection", "socket.socket.connect"):
        monkeypatch.setattr(name, note)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    write(tmp_path / "d", {"a.jsonl": jsonl("a"), "b.jsonl": jsonl("b")})
    assert read(tmp_path / "d", streaming=streaming) == ["a", "b"]
    assert asked == []


# Forms of files

BOM = "\ufeff"
LISTED = json.dumps([{"text": "a"}, {"text": "b\n"}, {"n": 1}, {"text": "ü"}], ensure_ascii=False)
FORMS: dict[str, str | bytes] = {
    "t.JSONL": jsonl("a", "b\n", "ü"),
    "t.ndjson": jsonl("a", "b\n", "ü"),
    "t.jsonlines": jsonl("a", "b\n", "ü"),
    "t.PARQUET": parquet("a", "b\n", None, "ü"),
    "t.json.gz": gzip.compress(jsonl("a", "b\n", "ü").encode()),
    "two-parts.jsonl.gz": gzip.compress(jsonl("a").encode())
    + gzip.compress(jsonl("b\n", "ü").encode()),
    "t.NDJSON.GZ": gzip.compress(LISTED.encode()),
    "t.jsonl.bz2": bz2.compress(jsonl("a", "b\n", "ü").encode()),
    "t.jsonl.zst": zstd(jsonl("a", "b\n", "ü")),
    "stream.arrow": arrow_stream("a", "b\n", "ü"),
    "file.arrow": arrow(pa.ipc.new_file, "a", "b\n", "ü"),
    "listed.json": LISTED,
    "listed.jsonl": "\n" + LISTED,
    "indented.json": BOM + json.dumps(json.loads(LISTED), indent=2),
    "bom.jsonl": BOM + jsonl("a", "b\n", "ü"),
    "crlf.jsonl": jsonl("a", "b\n", "ü").replace("\n", "\r\n"),
    "bom-crlf-blank.jsonl": BOM + "\r\n" + jsonl("a", "", "b\n", "ü").replace("\n", "\r\n\r\n"),
    "no-end.jsonl": jsonl("a", "b\n", "ü").strip(),
    "omitted-nulls.jsonl": '{"id": 1}\n' + jsonl("a", "b\n") + '{"id": 2}\n' + jsonl("ü"),
    "null-first.jsonl": '{"text": null, "u": "x"}\n'
    + jsonl("a", "b\n")
    + '{"u": "y"}\n'
    + jsonl("ü"),
    "zstd.arrow": arrow(compressed, "a", "b\n", "ü"),
    "separators.jsonl": '{"text": "a"}\n{"text": "b\\n"}\n{"text": "ü", "x": "\u2028\x85"}\n',
}


@pytest.mark.parametrize("name", FORMS)
def test_tables_of_all_forms_are_read(name: str, tmp_path: Path):
    write(tmp_path, {name: FORMS[name]})
    assert read(tmp_path / name) == ["a", "b\n", "ü"]
    assert "left out" not in opened(tmp_path / name).found


@pytest.mark.parametrize("name", FORMS)
def test_tables_of_all_forms_resume_in_the_middle(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sparsify.data.documents.CHUNK_DOCUMENTS", 1)
    write(tmp_path, {name: FORMS[name]})
    chunks = list(opened(tmp_path / name).chunks(np.random.default_rng(0), None))
    for index, chunk in enumerate(chunks):
        position = json.loads(json.dumps(chunk.next))
        rest = opened(tmp_path / name).chunks(np.random.default_rng(0), position)
        assert list(rest) == chunks[index + 1 :]


def test_a_long_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = [f"{index} " + "ü]," * (index % 40) for index in range(500)]
    rows = [{"text": text} for text in texts]
    monkeypatch.setattr(json_files, "_JSON_PIECE_BYTES", 100)
    for indent in (None, 1):
        write(tmp_path, {"t.json": json.dumps(rows, indent=indent, ensure_ascii=False)})
        assert read(tmp_path / "t.json") == sorted(texts)


# Files that are refused


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 40_000_000_000)


def make_broken_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [make_fifo, make_zeros, make_sparse, make_broken_link, make_loop])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".json.gz", ".parquet", ".arrow", ".txt"])
def test_what_is_no_file_is_refused(make: Callable[[Path], None], suffix: str, tmp_path: Path):
    make(tmp_path / f"x{suffix}")
    assert f"dataset_name: '{tmp_path}/x{suffix}'" in refusal(tmp_path / f"x{suffix}")
    write(tmp_path, {f"good{suffix}": parquet("a") if suffix == ".parquet" else jsonl("a")})
    if suffix != ".txt":
        assert str(tmp_path) in refusal(tmp_path)
    elif make is make_sparse:
        assert read(tmp_path) == [jsonl("a")]
    else:
        assert read(tmp_path) == [jsonl("a")]
        assert "left out: x.txt (not a file)" in opened(tmp_path).found


def invalid_utf8(n_rows: int) -> bytes:
    rows = [b"good"] * n_rows
    rows[n_rows // 2] = b"bad \xff\xfe"
    buffer = pa.BufferOutputStream()
    column = pa.array(rows, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), buffer)
    return buffer.getvalue().to_pybytes()


def cut_stream() -> bytes:
    """A stream without its end and its last batch, which pyarrow reads without a word."""
    whole = arrow_stream("a", "b", "c", "d")
    return whole[: whole.rindex(b"\xff\xff\xff\xff", 0, len(whole) - 8)]


def repeated(text: str, n_rows: int, compression: str = "snappy") -> bytes:
    """A table of few bytes whose rows all hold a text that is stored once."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n_rows, np.int32)), pa.array([text]))
    buffer = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"text": column}), buffer, compression=compression, dictionary_pagesize_limit=2**30
    )
    return buffer.getvalue().to_pybytes()


def arrow_of(column: pa.Array) -> bytes:
    batch, buffer = pa.record_batch({"text": column}), pa.BufferOutputStream()
    with compressed(buffer, batch.schema) as writer:
        writer.write_batch(batch)
    return buffer.getvalue().to_pybytes()


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "t.csv": ("text\na\n", "is a table of comma-separated values, which is not read; convert it"),
    "t.TSV": ("text\na\n", "is a table of comma-separated values"),
    "t.csv.gz": (gzip.compress(b"text\na\n"), "is a table of comma-separated values"),
    "t.txt.gz": (gzip.compress(b"a"), "t.txt.gz' is not UTF-8 text; convert or remove it"),
    "t.zip": (b"PK\x03\x04\xff", "t.zip' is not UTF-8 text"),
    "cut.json.gz": (gzip.compress(os.urandom(9999))[:-20], "cannot be read: "),
    "cut2.jsonl.gz": (
        gzip.compress(jsonl(*map(str, range(9999))).encode())[:-20],
        "Truncated comp",
    ),
    "no.json.gz": (jsonl("a"), "cannot be read: zlib inflate failed: incorrect header check"),
    "no.jsonl.zst": (jsonl("a"), "cannot be read: ZSTD decompress failed: Unknown frame descr"),
    "utf8.jsonl": (
        jsonl("a", "b").encode() + b'{"text": "\xff"}\n',
        "line 3 is not UTF-8 (invalid",
    ),
    "utf16.jsonl": (jsonl("a").encode("utf-16"), "line 1 is not UTF-8"),
    "utf8.json": (b'[{"text": "a"}, {"text": "\xff"}]', "can't decode byte 0xff in position"),
    "utf8.parquet": (invalid_utf8(601), "row 301 is not UTF-8"),
    "half.jsonl": (jsonl("a") + '{"text": "\\ud83d"}\n', "row 2 has half of a surrogate pair"),
    "list.jsonl": (jsonl("a") + '["b"]\n', "line 2 is not an object {...}, as a row of a table is"),
    "strings.json": ('["a", "b"]', "row 1 of its list is not an object {...}"),
    "number.json": ("7", "line 1 is not an object"),
    "deep.jsonl": (jsonl("a") + "[" * 99999 + "\n", "line 2 has brackets nested too deep"),
    "deep.json": ("[" * 99999 + "\n", "row 1 of its list is not JSON (maximum recursion depth"),
    "digits.jsonl": ('{"text": ' + "7" * 9999 + "}\n", "Exceeds the limit (4300 digits)"),
    "open.json": ('[{"text": "a"}, {"text": "b"}', "row 2 of its list is not JSON"),
    "commas.json": (
        '[{"text": "a"} {"text": "b"}]',
        "row 1 of its list is not followed by a comma",
    ),
    "one-object.json": ('{\n"text": ["a"]\n}', "line 1 is not JSON (Expecting property name"),
    "nul.jsonl": ("\0" * 9999 + "\n", "line 1 is not JSON"),
    "mac.jsonl": (jsonl("a", "b").replace("\n", "\r"), "line 1 is not JSON (Extra data, character"),
    "cut.jsonl": (jsonl("a", "b")[:-4], "line 2 is not JSON (Unterminated string"),
    "text.parquet": ("no parquet", "Parquet magic bytes not found"),
    "cut.parquet": (parquet("a")[:-30], "cut.parquet' cannot be read: "),
    "empty.parquet": ("", "empty.parquet' is empty; name data with at least one row"),
    "no-rows.parquet": (parquet(), "is empty; name data with at least one row"),
    "nulls.parquet": (parquet(column="a"), "has no column 'text'; set it to one of a"),
    "text.arrow": ("no arrow", "text.arrow' cannot be read: it is cut off, or not Arrow; replace"),
    "cut.arrow": (cut_stream(), "it is cut off, or not Arrow"),
    "blank.jsonl": ("\n \r\n", "blank.jsonl' is empty"),
    "no-rows.json": (" [ ] ", "no-rows.json' is empty"),
    "bomb.parquet": (
        repeated("x" * 300_000_000, 2, "zstd"),
        "bytes of its row group 0 would become 3",
    ),
    "joined.arrow": (arrow_stream("a") + arrow_stream("b"), "more follows behind the end of its"),
    "joined-files.arrow": (2 * arrow(pa.ipc.new_file, "a"), "more follows behind the end of its"),
    "joined.json": (f"{LISTED}\n{LISTED}\n", "more follows behind the end of its list; write"),
    "joined-lines.json": (f"{LISTED}\n{J}", "more follows behind the end of its list; write"),
    "joined-empty.json": (f"[]\n{LISTED}", "more follows behind the end of its list; write one"),
    "joined.json.gz": (2 * gzip.compress(LISTED.encode()), "more follows behind the end of its"),
    "two-columns.jsonl": (
        jsonl("a", "b", "c") + 5 * '{"content": "d"}\n',
        """row 4 has no column 'text', but text in 'content'; rename that, or add "text": null""",
    ),
    "empty-rows.jsonl": ("{}\n{}\n", "row 1 has no column 'text'"),
    "late.jsonl": (
        jsonl("a") + '{"text": 7}',
        "holds values of type int, not text; set column_name to another col",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_message(name: str, tmp_path: Path):
    content, message = BAD_FILES[name]
    write(tmp_path, {name: content})
    said = refusal(tmp_path / name)
    assert message in said
    assert str(tmp_path / name) in said


def test_each_bad_file_has_its_place_named_in_a_folder(tmp_path: Path):
    for name, (content, _) in BAD_FILES.items():
        if name.endswith((".jsonl", ".arrow", ".parquet")) and content:
            good = (
                parquet("a")
                if ".parquet" in name
                else arrow_stream("a")
                if ".arrow" in name
                else jsonl("a")
            )
            folder = write(
                tmp_path / f"{name}.d",
                {f"0{Path(name).suffix}": good, f"1{Path(name).suffix}": content},
            )
            if name not in {"no-rows.parquet", "blank.jsonl"}:
                assert f"{folder}/1{Path(name).suffix}'" in refusal(folder), name


def test_rows_that_are_too_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (json_files, table_files):
        monkeypatch.setattr(module, "MAX_DOCUMENT", 50)
    write(tmp_path, {"t.jsonl": jsonl("a", "x" * 60), "t.parquet": parquet("a", "x" * 60)})
    assert "line 2 has more than 50 bytes" in refusal(tmp_path / "t.jsonl")
    assert "row 2 has 60 characters, more than 50; cut it into" in refusal(tmp_path / "t.parquet")


def test_list_with_space_behind_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_files, "_JSON_PIECE_BYTES", 10)
    write(tmp_path, {"t.json": LISTED + "\n" * 50, "u.json": LISTED + "\n" * 50 + "\0"})
    assert read(tmp_path / "t.json") == ["a", "b\n", "ü"]
    assert "more follows behind the end of its list" in refusal(tmp_path / "u.json")


@pytest.mark.parametrize("is_dictionary", [True, False])
def test_arrow_that_grows_is_refused(
    is_dictionary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    texts = pa.array(["x" * 2_000_000, "y"])
    content = arrow_of(texts.dictionary_encode() if is_dictionary else texts)
    write(tmp_path, {"t.arrow": content})
    assert [len(text) for text in read(tmp_path / "t.arrow")] == [2_000_000, 1]
    monkeypatch.setattr(limits, "_BOMB_BYTES", 1_000_000)
    assert re.search(
        r"of its batches would become 2,00\d,\d{3} in mem", refusal(tmp_path / "t.arrow")
    )


def test_many_empty_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(table_files, "_MAX_EMPTY_ROWS", 5)
    write(tmp_path, {"t.parquet": parquet("a", *[None] * 5, "b", *[""] * 5, "c")})
    assert read(tmp_path / "t.parquet") == ["a", "b", "c"]
    write(tmp_path, {"t.parquet": parquet("a", *[None] * 3, *[""] * 3, "b")})
    assert "6 rows up to row 7 are empty, one after the other" in refusal(tmp_path / "t.parquet")
    endless = pa.Array.from_buffers(pa.null(), 2**31 - 1, [None])
    write(tmp_path, {"t.arrow": arrow_of(endless)})
    assert "6 rows up to row 6 are empty, one after the other" in refusal(tmp_path / "t.arrow")


@pytest.mark.parametrize("name", ["json", "parquet", "csv", "text", "arrow", "webdataset"])
def test_formats_are_not_data_of_the_working_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, {"train.jsonl": jsonl("a"), "train.txt": "a", "t.parquet": parquet("a")})
    monkeypatch.chdir(tmp_path)
    assert f"'{name}' is a format of data, not data" in refusal(name)


# Folders

COMPANIONS = (
    *("_metadata", "_common_metadata", "_committed_1", "SHA256SUMS", "md5sums.txt", "x.sha512"),
    *("LICENSE_MIT.txt", "LICENSE-2.0.txt", "README_de.txt", "index.html", "train.jsonl~"),
    *("x.tmp", "x.idx", "x.jsonl.bak", "requirements.txt", "requirements-dev.txt", "COPYING"),
)
FOLDERS: dict[str, tuple[Files, list[str], str]] = {
    "tables": (
        {
            "z.jsonl": J,
            "sub/more.JSONL": jsonl("c"),
            "2024.ndjson.gz": gzip.compress(jsonl("d").encode()),
        },
        ["a", "c", "d"],
        "table: 2 .jsonl, 2024.ndjson.gz",
    ),
    "names of any kind": (
        {f"my-{name}-1.jsonl": jsonl(name) for name in ("x", "y")},
        ["x", "y"],
        "table: 2 .jsonl",
    ),
    "companions": (
        {
            "a.parquet": P,
            "b.parquet": P,
            "README.md": "#",
            "LICENSE.txt": "",
            "x.json": "{}",
            "_SUCCESS": "",
            "y.json": "{}",
        },
        ["b", "b"],
        "table: 2 .parquet, 2 rows; left out: 2 .json, _SUCCESS, README.md, 1 more",
    ),
    "what goes with a table": (
        {"a.jsonl": J, **dict.fromkeys(COMPANIONS, "x")},
        ["a"],
        "table: a.jsonl; left out: ",
    ),
    "programs beside parquet": (
        {"a.parquet": P, "load.py": "x", "sub/make.sh": "x", "look.ipynb": "{}"},
        ["b"],
        "table: a.parquet, 1 rows; left out: look.ipynb, load.py, make.sh",
    ),
    "programs beside Arrow": (
        {"a.arrow": arrow_stream("a"), "load.py": "x"},
        ["a"],
        "table: a.arrow; left out: load.py",
    ),
    "pages and JSON": (
        {"a.html": "1", "b.html": "2", "c.json": "{}"},
        ["1", "2", "{}"],
        "texts: 2 .html, c.json",
    ),
    "texts with the names of companions": (
        {"_a.txt": "1", "requirements.txt": "2", "b.txt": "3", "c.txt~": "4"},
        ["1", "2", "3", "4"],
        "texts: 3 .txt, c.txt~",
    ),
    "json beside jsonl": (
        {"a.jsonl": J, "b.json": LISTED},
        ["a", "a", "b\n", "ü"],
        "table: b.json",
    ),
    "json and a card": (
        {"a.json": J, "README.md": "# card"},
        ["a"],
        "table: a.json; left out: READ",
    ),
    "metadata": (
        {"a.jsonl": J, "dataset_info.json": "{}"},
        ["a"],
        "table: a.jsonl; left out: dataset_in",
    ),
    "source tree": (
        {"a.py": "1", "sub/b.py": "2", "c.json": "{}", "d.md": "3", "e.txt": "4", "f.csv": "5"},
        ["1", "2", "3", "4", "5", "{}"],
        "texts: 2 .py, f.csv, c.json, 2 more; files that are not UTF-8 are left out",
    ),
    "hidden": (
        {"a.jsonl": J, ".b.jsonl": P, ".git/c.jsonl": P, "__pycache__/d.py": "x"},
        ["a"],
        "table: a",
    ),
    "private": (
        {"a.jsonl": J, "__MACOSX/a.jsonl": jsonl("x")},
        ["a"],
        "table: a.jsonl; left out: a.jso",
    ),
    "train": (
        {"train-1.jsonl": J, "train-2.jsonl": J, "validation.jsonl": jsonl("v")},
        ["a", "a"],
        "table: 2 .j",
    ),
    "folders": (
        {"train/x.jsonl": J, "val/x.jsonl": jsonl("v"), "test/train.jsonl": jsonl("t")},
        ["a"],
        "table: ",
    ),
    "shards": (
        {
            "data/train-00000-of-00001-ab.parquet": P,
            "data/test_ood-00000-of-00001.parquet": parquet("x"),
        },
        ["b"],
        "table: train-00000-of-00001-ab.parquet, 1 rows",
    ),
    "empty shard": ({"a.jsonl": "", "b.jsonl": J}, ["a"], "table: 2 .jsonl"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_read_as_what_they_are(name: str, tmp_path: Path):
    files, expected, found = FOLDERS[name]
    folder = write(tmp_path / "in[1]", files)
    assert read(folder) == expected
    assert opened(folder).found.startswith(found)


def test_splits_of_a_folder(tmp_path: Path):
    folder = write(tmp_path / "d", FOLDERS["folders"][0])
    assert read(folder, split="validation") == ["v"]
    assert read(folder, split="test") == ["t"]
    folder = write(tmp_path / "e", FOLDERS["shards"][0])
    assert read(folder, split="test_ood") == ["x"]
    assert "has no split 'dev'; use one of test_ood, train" in refusal(folder, split="dev")
    folder = write(tmp_path / "f", {"a.jsonl": J})
    assert "has no split 'validation'; use one of train" in refusal(folder, split="validation")


BAD_FOLDERS: dict[str, tuple[Files, str]] = {
    "two formats": (
        {"a.jsonl": J, "b.parquet": P},
        "holds a.jsonl, b.parquet, and it is not clear which",
    ),
    "three formats": (
        {"a.arrow": arrow_stream("x"), "b.parquet": P, "c.ndjson": J, "d.ndjson": J},
        "2 .ndjson, a.arrow, b.pa",
    ),
    "with text": ({"a.jsonl": J, "b.txt": "text"}, "holds a.jsonl, b.txt, and it is not clear"),
    "with a program": (
        {"a.jsonl": J, "load.py": "x"},
        "holds a.jsonl, load.py, and it is not clear which are meant; name one file, as '",
    ),
    "with a private program": (
        {"a.jsonl": J, "__init__.py": ""},
        "holds a.jsonl, __init__.py, and",
    ),
    "with private csv": ({"a.parquet": P, "_b.csv": "text"}, "holds _b.csv, a.parquet, and"),
    "with csv": ({"a.parquet": P, "b.csv": "text"}, "holds b.csv, a.parquet, and"),
    "with code": (
        {"a.jsonl": J, **{f"{i}.py": "" for i in range(9)}},
        "holds 9 .py, a.jsonl, and it is",
    ),
    "csv": (
        {"a.csv": "text\nx\n", "README.md": "#"},
        "a.csv' is a table of comma-separated values",
    ),
    "split and none": (
        {"train.jsonl": J, "more.jsonl": J},
        "as 'train.jsonl', but 'more.jsonl' belongs to none",
    ),
    "split and year": (
        {"my-train-1.jsonl": J, "2024.jsonl": J},
        "'2024.jsonl' belongs to none; name one",
    ),
    "folder and file": (
        {"train/a.jsonl": J, "b.jsonl": J},
        "as 'train/a.jsonl', but 'b.jsonl' belongs to",
    ),
    "two splits": ({"train-test.jsonl": J, "train.jsonl": J}, "'train-test.jsonl' belongs to two"),
    "shard and none": (
        {"data/train-00000-of-00001.parquet": P, "x.parquet": P},
        "'x.parquet' belongs to none",
    ),
    "no train": ({"test.jsonl": J}, "has no split 'train'; use one of test"),
    "columns differ": (
        {"a.parquet": P, "b.parquet": parquet("x", column="code")},
        "b.parquet' has no column 'text'; set it to one of code",
    ),
    "rows differ": (
        {"a.jsonl": J, "b.jsonl": '{"code": "x"}'},
        "b.jsonl' has no column 'text'; set it",
    ),
    "types differ": (
        {"a.jsonl": J, "b.jsonl": '{"text": ["x"]}'},
        "b.jsonl' holds lists of str, not text",
    ),
    "subsets": (
        {
            "en/a.parquet": P,
            "de/a.parquet": P,
            "README.md": "---\nconfigs:\n- config_name: en\n  x: y\n- config_name: de\n---\n",
        },
        "holds several subsets, as its README.md says (en, de); name the folder",
    ),
    "nothing": ({".hidden": "x"}, "is empty; name a file or folder with text"),
    "no rows": ({"a.jsonl": "\n", "b.jsonl": ""}, "is empty; name data with at least one row"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_ambiguous_folders_are_one_message(name: str, tmp_path: Path):
    files, message = BAD_FOLDERS[name]
    said = refusal(write(tmp_path / "in[1]", files))
    assert message in said
    assert str(tmp_path / "in[1]") in said


def test_links_below_a_folder_are_followed_to_files_only(tmp_path: Path):
    write(tmp_path / "else", {"b.jsonl": jsonl("b")})
    folder = write(tmp_path / "d", {"a.jsonl": J})
    (folder / "loop").symlink_to(folder)
    (folder / "c.jsonl").symlink_to(tmp_path / "else" / "b.jsonl")
    assert read(folder) == ["a", "b"]
    assert opened(folder).found == "table: 2 .jsonl; left out: loop (not a file)"


# Data sets that were saved


@pytest.fixture
def saved(tmp_path: Path, texts: list[str]) -> Path:
    """A folder with a data set of ten shards, and one of two splits."""
    whole = Dataset.from_dict({"n": range(40), "text": texts})
    whole.save_to_disk(tmp_path / "one", num_shards=10)
    splits = {"train": whole.select(range(30)), "held[out]": whole.select(range(30, 40))}
    DatasetDict(**splits).save_to_disk(tmp_path / "dict")
    return tmp_path


@pytest.mark.parametrize("streaming", [True, False])
def test_saved_data_set_is_read_as_such(streaming: bool, saved: Path, texts: list[str]):
    assert read(saved / "one", streaming=streaming) == sorted(texts)
    assert read(saved / "dict", streaming=streaming) == sorted(texts[:30])
    assert read(saved / "dict", streaming=streaming, split="held[out]") == sorted(texts[30:])
    assert read(saved / "dict" / "held[out]", streaming=streaming) == sorted(texts[30:])
    assert opened(saved / "one").found == "table: 10 .arrow"
    assert "has no split 'test'; use one of held[out], train" in refusal(
        saved / "dict", split="test"
    )
    assert "has no split 'test'; use one of train" in refusal(saved / "one", split="test")


def test_saved_data_set_gives_the_batches_of_the_same_parquet_files_and_resumes(
    saved: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
):
    for index in range(10):
        part = Dataset.from_dict({"text": texts[4 * index : 4 * index + 4]})
        (saved / "parquet").mkdir(exist_ok=True)
        part.to_parquet(saved / "parquet" / f"{index}.parquet")

    def load(name: str) -> Any:
        config = DataConfig(
            dataset_name=str(saved / name), n_ctx=8, shuffle_block_samples=16, n_epochs=2
        )
        return build_loader(config, batch_size=4, tokenizer=tokenizer, seed=0)

    def as_lists(batches: Iterable[Any]) -> list[Any]:
        return [batch.tolist() for batch in batches]

    expected = as_lists(load("parquet"))
    loader = load("one")
    given = as_lists(islice(loader, len(expected) // 3))
    resumed = load("one")
    resumed.load_state_dict(loader.state_dict())
    loader.close()
    assert given + as_lists(resumed) == expected


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rewrite(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "shard": (
        "one",
        delete("data-00003-of-00010.arrow"),
        "data-00003-of-00010.arrow' is missing or damaged",
    ),
    "state": (
        "one",
        delete("state.json"),
        "state.json' is missing or damaged (there is no such file)",
    ),
    "dict": (
        "dict",
        delete("dataset_dict.json"),
        "dataset_dict.json' is missing or damaged (there is",
    ),
    "split": (
        "dict",
        delete("train/state.json"),
        "train/state.json' is missing or damaged (No such file",
    ),
    "no JSON": (
        "one",
        rewrite("state.json", "{"),
        "state.json' is missing or damaged (it is not JSON); co",
    ),
    "list": ("one", rewrite("state.json", "[]"), "(it is not a JSON object)"),
    "nothing listed": ("one", rewrite("state.json", "{}"), "(it lists no files)"),
    "elsewhere": (
        "one",
        rewrite("state.json", '{"_data_files": [{"filename": "../dict/x"}]}'),
        "it lists no files",
    ),
    "splits": (
        "dict",
        rewrite("dataset_dict.json", '{"splits": ["../one"]}'),
        "(it lists no splits)",
    ),
    "huge": ("one", rewrite("state.json", " " * 2_000_000), "2,000,000 bytes, and at most"),
    "text shard": (
        "one",
        rewrite("data-00003-of-00010.arrow", "x" * 99),
        "data-00003-of-00010.arrow', a file of",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_saved_data_set_is_one_message(name: str, saved: Path):
    folder, damage, message = DAMAGES[name]
    damage(saved / folder)
    assert message in refusal(saved / folder)


# The cache


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "datasets"))
    write(tmp_path, {"t.jsonl": J})
    assert read(tmp_path / "t.jsonl") == ["a"]  # streaming needs none
    message = f"the cache folder '{tmp_path}/file/datasets' cannot be used (Not a directory: '"
    said = refusal(tmp_path / "t.jsonl", streaming=False)
    assert message in said
    assert said.endswith("make it writable, or set HF_DATASETS_CACHE to another folder")


def test_cache_of_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "hub" / "datasets--a--b"))

    monkeypatch.setattr(sources, "load_dataset", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    said = refusal("user/name")
    assert f"the cache folder '{tmp_path}/hub' cannot be used (Permission denied" in said
    assert said.endswith("or set HF_HUB_CACHE to another folder")


# Memory

READ = """
import resource, sys
import numpy as np
from sparsify.data.config import DataConfig
from sparsify.data.sources import open_documents
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
before = peak()
for name, n_rows in (("many.parquet", 300), ("ids.parquet", 20), ("long.jsonl", 2)):
    is_tokenized = name == "ids.parquet"
    config = DataConfig(dataset_name=name, n_ctx=100_000, is_tokenized=is_tokenized)
    n = 0
    for chunk in open_documents(config).chunks(np.random.default_rng(0), None):
        n += len(chunk.documents)
        if n >= n_rows:
            break
    print(name, n, peak() - before)
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path):
    write(tmp_path, {"many.parquet": repeated("x" * 1_000_000, 10_000)})  # 10 GB
    ids = pa.table({"input_ids": [np.zeros(100_000, np.int64)] * 200})
    pq.write_table(ids, tmp_path / "ids.parquet")  # 160 MB
    write(tmp_path, {"long.jsonl": jsonl("x" * 50_000_000, "y")})
    said = subprocess.run(
        [sys.executable, "-c", READ],
        cwd=tmp_path,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ).stdout
    peaks = [int(line.split()[2]) for line in said.splitlines()]
    assert len(peaks) == 3
    assert max(peaks) < 600, said
