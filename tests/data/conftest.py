"""A small tokenizer and documents for the data tests."""

import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from sparsify.tlens.tokenizers import train_tokenizer

WORDS = ["def", "return", "yield", "class", "import", "self", "value", "range", "print", "pass"]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """40 texts of different lengths, no two alike."""
    rng = random.Random(0)
    return [f"# {i}\n" + " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for i in range(40)]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    return train_tokenizer(texts, vocab_size=300)


@pytest.fixture
def source_tree(tmp_path: Path, texts: list[str]) -> Path:
    """A folder with each of the texts in a file."""
    for index, text in enumerate(texts):
        folder = tmp_path / "tree" / f"part{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:02}.py").write_text(text)
    return tmp_path / "tree"
