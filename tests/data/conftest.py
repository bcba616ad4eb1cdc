"""A folder of documents for the data tests."""

from pathlib import Path

import pytest


@pytest.fixture
def source_tree(tmp_path: Path, texts: list[str]) -> Path:
    """A folder with each of the texts in a file."""
    for index, text in enumerate(texts):
        folder = tmp_path / "tree" / f"part{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:02}.py").write_text(text)
    return tmp_path / "tree"
