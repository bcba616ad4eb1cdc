"""Settings of the data to train on.

Imports nothing heavy, so that a wrong setting is reported at once.
"""

from difflib import get_close_matches
from typing import Self

from pydantic import model_validator

from sparsify.settings.base_config import BaseConfig, Count, Name, Seed
from sparsify.settings.paths import NameOrPath, absolute_name

PYTHON_STDLIB = "python-stdlib"
PYTHON_STDLIB_SPLITS = ("train", "validation")


class DataConfig(BaseConfig):
    """Text or token ids, and how they are cut into sequences and put in order."""

    dataset_name: NameOrPath
    """`python-stdlib` (built in), a file or folder, or the name of a dataset on the hub.

    Parquet, jsonl, json and Arrow files are tables with one document per row. Of any other file,
    and of each file of a folder without tables, the text is one document.
    docs/reliability.md says which files and folders are recognised.
    """
    subset: Name | None = None
    """Name of a part of a hub dataset (its "config"). null: the dataset has no parts."""
    split: Name = "train"
    """`train` or `validation` of `python-stdlib`; of other data, whatever splits they have. 8 % of
    that validation split is repeated from training (`sparsify/data/python_stdlib.py`)."""
    streaming: bool = True
    """Read tables piece by piece as they are needed. False downloads and caches them first, which
    also lets documents be shuffled over the whole table instead of over its files."""
    is_tokenized: bool = False
    """Rows of a table are token ids, exactly `n_ctx` in each."""
    column_name: Name | None = None
    """Column of a table. null: `input_ids` if `is_tokenized`, else `text`."""
    tokenizer_name: NameOrPath | None = None
    """Tokenizer of the text, or that made the ids: `tiny-python`, a name of the hub, or a folder
    with a slash in its path, as `./folder`. null: the model's own."""
    n_ctx: Count
    """Tokens in a sequence, BOS included."""
    add_bos_token: bool = False
    """Every sequence starts with the BOS token."""
    seed: Seed | None = None
    """Seed of the order. null: the run's seed."""
    n_epochs: Count | None = 1
    """Passes over the data. null: no end."""
    shuffle_block_samples: Count = 4096
    """Sequences that are held in memory and shuffled together. 1 keeps each document's sequences
    in a row and gives the first batch soonest, which suits an evaluation on few samples."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.is_tokenized and self.add_bos_token:
            raise ValueError(
                "add_bos_token: true cannot be combined with is_tokenized: true, whose sequences "
                "are used as they are; set one of them to false"
            )
        if self.add_bos_token and self.n_ctx == 1:
            raise ValueError("n_ctx: 1 has room for the BOS token only; use at least 2")
        return self

    @model_validator(mode="after")
    def _sequences_have_a_next_token(self) -> Self:
        if self.n_ctx == 1:
            raise ValueError("n_ctx: 1 leaves no next token to predict; use at least 2")
        return self

    @model_validator(mode="after")
    def _python_stdlib_is_spelt_right(self) -> Self:
        # Anything else would be looked for on the hub, which takes long without a network.
        is_close = get_close_matches(self.dataset_name, [PYTHON_STDLIB], cutoff=0.8)
        if is_close and self.dataset_name != PYTHON_STDLIB:
            raise ValueError(
                f"dataset_name: '{self.dataset_name}' is unknown; did you mean '{PYTHON_STDLIB}'?"
            )
        return self

    @model_validator(mode="after")
    def _settings_suit_python_stdlib(self) -> Self:
        if self.dataset_name != PYTHON_STDLIB:
            return self
        if self.split not in PYTHON_STDLIB_SPLITS:
            raise ValueError(
                f"split: {PYTHON_STDLIB} has no split '{self.split}'; "
                f"use one of {', '.join(PYTHON_STDLIB_SPLITS)}"
            )
        if settings := table_settings(self):
            raise ValueError(f"{settings}: has no meaning for {PYTHON_STDLIB}; remove it")
        return self

    def with_absolute_paths(self) -> Self:
        """Return the same settings, whose data and tokenizer are found from any folder."""
        names = {}
        if self.dataset_name != PYTHON_STDLIB:
            names["dataset_name"] = absolute_name(self.dataset_name)
        # One without a slash is bundled or on the hub; `load_tokenizer` takes no folder for it.
        if "/" in (self.tokenizer_name or ""):
            names["tokenizer_name"] = absolute_name(str(self.tokenizer_name))
        return self.model_copy(update=names)

    @property
    def column(self) -> str:
        """Name of the column that will be read."""
        return self.column_name or ("input_ids" if self.is_tokenized else "text")


def table_settings(config: DataConfig) -> str:
    """Return the settings that only a table can obey, as `name: value, ...`, or nothing."""
    defaults = {"subset": None, "streaming": True, "is_tokenized": False, "column_name": None}
    given = {name: getattr(config, name) for name in defaults}
    return ", ".join(f"{name}: {given[name]}" for name in defaults if given[name] != defaults[name])
