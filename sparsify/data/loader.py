"""Batches of token sequences, which can be resumed exactly."""

import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsify.data.batches import saved_count
from sparsify.data.config import DataConfig
from sparsify.data.documents import TextFiles
from sparsify.data.sources import open_documents
from sparsify.data.tokens import START, IdPacker, Pack, Place, TextPacker, TokenSequences
from sparsify.settings.base_config import UserError
from sparsify.tlens.tokenizers import bos_token, eos_token

MAX_STATE_PARTS = 10_000
"""More than the state has in which `datasets` remembers a place. One that holds itself has more."""

Tokens = Int[Tensor, "batch pos"]


def build_loader(
    config: DataConfig,
    *,
    batch_size: int,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    d_vocab: int | None = None,
    model_n_ctx: int | None = None,
) -> "TokenLoader":
    """Return batches of `config`'s data, shape `batch pos`, as int64.

    The last batch is left out if it is short. A second iteration gives the same batches again;
    with `state_dict` and `load_state_dict` another process resumes it exactly.

    Args:
        config: The data.
        batch_size: Sequences in a batch.
        tokenizer: A fast tokenizer. Not used for tokenized data, where it may be None.
        seed: Of the order, if the config has none.
        d_vocab: Number of token ids that the model knows. None: not checked.
        model_n_ctx: Longest sequence that the model takes. None: not checked.

    Raises:
        UserError: The data cannot be read or do not suit the model. The iteration raises what shows
            only in later rows, or, except for a short text, that there is not even one batch.
    """
    if model_n_ctx is not None and config.n_ctx > model_n_ctx:
        raise UserError(
            f"n_ctx: {config.n_ctx} is beyond the model's context of {model_n_ctx}; "
            f"use at most {model_n_ctx}"
        )
    pack = _packer(config, tokenizer, d_vocab)
    documents = open_documents(config)
    sequences = TokenSequences(
        documents,
        pack,
        batch_size=batch_size,
        n_epochs=config.n_epochs,
        block_samples=config.shuffle_block_samples,
        seed=seed if config.seed is None else config.seed,
        name=config.dataset_name,
    )
    if isinstance(documents, TextFiles) and documents.is_small():
        next(sequences.batches())  # raises if there is none
    return TokenLoader(sequences, documents.found, d_vocab)


class TokenLoader:
    """A `Loader` of token sequences. A thread reads for it while the model trains.

    Args:
        sequences: Where they come from.
        found: What was taken for their data, for the log. Empty: what their name says.
        d_vocab: Number of token ids that the model knows. None: not checked.
    """

    def __init__(
        self, sequences: TokenSequences, found: str = "", d_vocab: int | None = None
    ) -> None:
        self.found = found
        self._sequences = sequences
        self._d_vocab = d_vocab
        self._place = START  # behind the last batch given
        self._next_start = START
        self._iteration: Callable[[], Generator[Tokens, None, None] | None] = lambda: None

    def __iter__(self) -> Iterator[Tokens]:
        """Iterate over the batches; see `build_loader`."""
        self._place, self._next_start = self._next_start, START
        iteration = self._iterate(self._place)
        # One that is left ends when it is dropped, and its thread with it.
        self._iteration = weakref.ref(iteration)
        return iteration

    def samples_by_chunk(self) -> Iterator[int]:
        """Count the samples of each chunk of one epoch; they are read for it, by the caller."""
        return self._sequences.samples_by_chunk()

    def close(self) -> None:
        """End the iteration and its thread, if there is one."""
        if (iteration := self._iteration()) is not None:
            iteration.close()

    def state_dict(self) -> dict[str, Any]:  # of a place, whose fields have several types
        """Return the place behind the last batch given, as `torch.load(weights_only=True)` can."""
        return asdict(self._place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration resume where `state_dict` was called.

        Raises:
            ValueError: The state is not a place in such data.
        """
        counts = ("epoch", "block", "n_skipped", "n_given")
        position, remainder = state["position"], state["remainder"]
        _check_position(position, is_text=isinstance(self._sequences.documents, TextFiles))
        self._check_remainder(remainder)
        self._place = self._next_start = Place(
            **{name: saved_count(state, name) for name in counts},
            position=position,
            remainder=remainder,
        )

    def _check_remainder(self, remainder: object) -> None:
        n_ids = self._d_vocab or 2**31
        if not isinstance(remainder, list) or not all(
            type(token) is int and 0 <= token < n_ids for token in remainder
        ):
            raise ValueError(f"loader.remainder is not a list of token ids below {n_ids:,}")

    def _iterate(self, start: Place) -> Generator[Tokens, None, None]:
        with closing(self._sequences.batches(start)) as batches:
            for place, sequences in batches:
                self._place = place
                yield torch.from_numpy(sequences.astype(np.int64))


def _check_position(position: object, *, is_text: bool) -> None:
    """See that a position in documents is one: what is done, and how far the next one is read."""
    if position is None:
        return
    if not isinstance(position, list) or len(position) != 2:
        raise ValueError("loader.position is not a list of two")
    saved_count({"position": position[0]}, "position")
    if is_text:
        saved_count({"position": position[1]}, "position")
    elif position[1] is not None and not _is_plain_dict(position[1]):
        raise ValueError("loader.position has no plain state of a table")


def _is_plain_dict(value: object) -> bool:
    """Return whether a value is a dict of plain data, and not too many of them."""
    left, n_seen = [value], 0
    while left and n_seen <= MAX_STATE_PARTS:
        part = left.pop()
        n_seen += 1
        if isinstance(part, dict):
            left += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            left += part
        elif part is not None and not isinstance(part, str | int | float):
            return False
    return isinstance(value, dict) and not left


def _packer(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, d_vocab: int | None
) -> Pack:
    if config.is_tokenized:
        return IdPacker(config.n_ctx, config.dataset_name, d_vocab)
    tokenizer = check_tokenizer(config, tokenizer, d_vocab)
    eos = eos_token(tokenizer)
    assert eos is not None, "as has been checked"
    bos = bos_token(tokenizer) if config.add_bos_token else None
    return TextPacker(tokenizer, config.n_ctx, eos, bos)


def check_tokenizer(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, d_vocab: int | None
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a text, if it suits the model and the config.

    Args:
        config: The text.
        tokenizer: What would make tokens of it. None: there is none, which is an error.
        d_vocab: Number of token ids that the model knows. None: not checked.

    Raises:
        UserError: It is not a fast one, gives ids that the model does not know, or lacks a special
            token.
    """
    if tokenizer is None:
        raise UserError("tokenizer_name: text needs a tokenizer and the model has none; name one")
    name = config.tokenizer_name or tokenizer.name_or_path or "the model's tokenizer"
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer_name: '{name}' has no fast version (tokenizer.json); use one that has"
        )
    if eos_token(tokenizer) is None:
        raise UserError(
            f"tokenizer_name: '{name}' has no end-of-text token of its own to put between "
            f"documents; set eos_token in its tokenizer_config.json, or name another tokenizer"
        )
    if config.add_bos_token and bos_token(tokenizer) is None:
        raise UserError(
            f"add_bos_token: '{name}' has no BOS token of its own; set add_bos_token: false, or "
            f"name another tokenizer"
        )
    largest_id = max(tokenizer.get_vocab().values())
    if d_vocab is not None and largest_id >= d_vocab:
        raise UserError(
            f"tokenizer_name: '{name}' has token ids up to {largest_id}, but the model's "
            f"vocabulary has {d_vocab} ids from 0; use the tokenizer the model was trained with"
        )
    return tokenizer
