from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from sparsify.data import documents
from sparsify.data.documents import Chunk, Documents, TableRows, TextFiles, read_piece
from sparsify.settings.base_config import UserError


def read_all(source: Documents, seed: int = 0) -> list[Chunk]:
    return list(source.chunks(np.random.default_rng(seed), None))


def joined(chunks: list[Chunk]) -> list[str]:
    """The whole documents, in the order of the chunks."""
    result: list[str] = []
    continues = False
    for chunk in chunks:
        for index, text in enumerate(chunk.documents):
            assert isinstance(text, str)
            if continues and index == 0:
                result[-1] += text
            else:
                result.append(text)
        continues = chunk.is_cut
    return result


@pytest.fixture(params=["files", "table"])
def source(
    request: pytest.FixtureRequest,
    texts: list[str],
    source_tree: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Documents:
    """The texts, in several chunks."""
    monkeypatch.setattr(documents, "CHUNK_DOCUMENTS", 7)
    if request.param == "files":
        return TextFiles(sorted(source_tree.rglob("*.py")), skip_binary=True)
    table = Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=4)
    return TableRows(table, "text", is_tokenized=False, name="table")


def test_every_document_comes_once_in_an_order_of_the_seed(source: Documents, texts: list[str]):
    first, again, other = (joined(read_all(source, seed)) for seed in (0, 0, 1))
    assert sorted(first) == sorted(texts)
    assert first == again
    assert first != other
    assert sorted(other) == sorted(texts)


def test_a_stream_is_resumed_behind_each_chunk(source: Documents):
    chunks = read_all(source)
    assert len(chunks) > 5
    for index, chunk in enumerate(chunks):
        rest = list(source.chunks(np.random.default_rng(0), chunk.next))
        assert [c.documents for c in rest] == [c.documents for c in chunks[index + 1 :]]


def test_a_long_file_is_one_document_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "CHUNK_CHARS", 100)
    text = "".join(f"line {i}: ü\n" for i in range(60)) + "é" * 300
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(documents.read_piece, "__defaults__", (100,))
    chunks = read_all(TextFiles([tmp_path / "a.txt"], skip_binary=False))
    assert joined(chunks) == [text]
    assert max(len(chunk.documents[0]) for chunk in chunks) <= 100
    assert [chunk.is_cut for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


def test_pieces_end_with_a_line_or_between_characters(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("ab\ncd€\N{SNAKE}".encode())  # 3 + 2 + 3 + 4 bytes
    assert read_piece(path, 0, max_bytes=5) == ("ab\n", 3)
    assert read_piece(path, 3, max_bytes=4) == ("cd", 5)
    assert read_piece(path, 5, max_bytes=6) == ("€", 8)
    assert read_piece(path, 8, max_bytes=4) == ("\N{SNAKE}", 0)


def test_empty_and_binary_files_of_a_tree_are_left_out(tmp_path: Path):
    paths = [tmp_path / name for name in ("text", "empty", "binary")]
    for path, content in zip(paths, [b"text", b"", b"\x89PNG\xff"], strict=True):
        path.write_bytes(content)
    assert joined(read_all(TextFiles(paths, skip_binary=True))) == ["text"]


def test_binary_file_is_refused_when_it_was_asked_for(tmp_path: Path):
    path = tmp_path / "picture.txt"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match=r"dataset_name: '.*picture.txt' is not UTF-8 text; conver"):
        read_all(TextFiles([path], skip_binary=False))


@pytest.mark.parametrize("rest", [b"caf\xe9", b"\x80" * 40])
def test_rest_of_a_long_file_that_is_not_utf8_is_left_out_of_a_tree(
    rest: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(documents.read_piece, "__defaults__", (20,))
    paths = [tmp_path / name for name in ("long", "other")]
    paths[0].write_bytes(b"16 bytes of text\n" + rest)
    paths[1].write_text("other")
    chunks = read_all(TextFiles(paths, skip_binary=True))
    assert sorted(joined(chunks)) == ["16 bytes of text\n", "other"]
    with pytest.raises(UserError, match="long' is not UTF-8 text; convert"):
        read_all(TextFiles(paths, skip_binary=False))


def test_file_that_cannot_be_read_is_refused(tmp_path: Path):
    files = TextFiles([tmp_path / "gone.txt"], skip_binary=True)
    with pytest.raises(
        UserError, match=r"gone.txt' cannot be read \(No such file or directory\); re"
    ):
        read_all(files)


def test_empty_rows_are_left_out():
    table = Dataset.from_dict({"text": ["a", "", None, "b"]}).to_iterable_dataset()
    assert joined(read_all(TableRows(table, "text", is_tokenized=False, name="t"))) == ["a", "b"]


@pytest.fixture
def long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of five pieces."""
    monkeypatch.setattr(documents.read_piece, "__defaults__", (100,))
    path = tmp_path / "a.txt"
    path.write_text("nine more\n" * 50)
    return path


def test_long_file_that_becomes_shorter_while_it_is_read_is_refused(long_file: Path):
    chunks = TextFiles([long_file], skip_binary=True).chunks(np.random.default_rng(0), None)
    next(chunks)
    long_file.write_text("nine more\n" * 10)
    message = r"a.txt' has become shorter than the 100 bytes already read of it; restore it, then"
    with pytest.raises(UserError, match=message):
        list(chunks)


def test_long_file_that_vanishes_while_it_is_read_is_named(long_file: Path):
    chunks = TextFiles([long_file], skip_binary=True).chunks(np.random.default_rng(0), None)
    next(chunks)
    long_file.unlink()
    with pytest.raises(UserError, match=r"a.txt' cannot be read \(No such file or directory\); re"):
        list(chunks)
