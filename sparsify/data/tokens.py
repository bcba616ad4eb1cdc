"""Documents to sequences of tokens, in a shuffled order that can be resumed exactly.

Sequences are cut from the stream of documents, collected into blocks, and each block is shuffled.
So memory is bounded, no sequence comes twice in an epoch, and the place in the data is small: where
the block begins, and how many of its sequences have been given out.
"""

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sparsify.data.documents import Chunk, Documents, Position
from sparsify.data.read_ahead import ReadAhead
from sparsify.settings.base_config import UserError

Sequences = Int32[np.ndarray, "sample pos"]
Pack = Callable[[Chunk, list[int]], tuple[Sequences, list[int]]]
"""Cuts a chunk, preceded by the tokens left over from the one before, into sequences; returns
these and the tokens left over."""


MAX_PIECE_CHARS = 2_000_000
"""Characters that are made tokens at once, which takes up to 250 bytes of memory for each."""


class TextPacker:
    """Puts an end-of-text token behind each document and cuts every `n_ctx` tokens.

    Args:
        tokenizer: The tokenizer; a copy of it is used.
        n_ctx: Tokens in a sequence.
        eos_token_id: The end-of-text token.
        bos_token_id: First token of every sequence. None: a sequence is text only.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        n_ctx: int,
        eos_token_id: int,
        bos_token_id: int | None,
    ) -> None:
        self.n_ctx = n_ctx
        self.bos_token_id = bos_token_id
        self._eos = np.array([eos_token_id], dtype=np.int32)
        # A tokenizer cannot be set up for a call while another thread is in one.
        self._tokenizer: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # what looks like one in a document is text

    def __call__(self, chunk: Chunk, remainder: list[int]) -> tuple[Sequences, list[int]]:
        """See `Pack`."""
        parts = [np.array(remainder, dtype=np.int32)]
        for text in chunk.documents:
            assert isinstance(text, str), "ids have their own packer"
            parts += [*map(self._ids, _pieces(text)), self._eos]
        if chunk.is_cut:
            parts.pop()
        tokens = np.concatenate(parts)
        n_text = self.n_ctx - (self.bos_token_id is not None)
        n_used = len(tokens) // n_text * n_text
        sequences = tokens[:n_used].reshape(-1, n_text)
        if self.bos_token_id is not None:
            sequences = np.insert(sequences, 0, self.bos_token_id, axis=1)
        return sequences, tokens[n_used:].tolist()

    def _ids(self, text: str) -> Int32[np.ndarray, " token"]:
        # Of the tokenizer's calls only those for batches let other threads run meanwhile. A batch
        # of one text uses one thread, and an array by text holds the others up for a moment only.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int32)


def _pieces(text: str) -> Iterator[str]:
    """Cut a very long text behind a line, or, in a longer line, anywhere."""
    begin = 0
    while begin < len(text):
        end = begin + MAX_PIECE_CHARS
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


@dataclass(frozen=True)
class IdPacker:
    """Takes rows of token ids as they are.

    Attributes:
        name: What to call the data in messages.
        d_vocab: Number of token ids that the model knows. None: not checked.
    """

    n_ctx: int
    name: str
    d_vocab: int | None

    def __call__(self, chunk: Chunk, remainder: list[int]) -> tuple[Sequences, list[int]]:
        """See `Pack`; nothing is ever left over.

        Raises:
            UserError: A row is not `n_ctx` long, or has an id outside the vocabulary.
        """
        for row in chunk.documents:
            check_length(len(row), self.n_ctx, self.name)
        ids = np.array(chunk.documents)  # of whatever type holds them
        if ids.min() < 0 or (self.d_vocab is not None and ids.max() >= self.d_vocab):
            known = "ids start at 0" if ids.min() < 0 else f"the model knows {self.d_vocab} ids"
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(
                f"dataset_name: '{self.name}' has token id {bad}, but {known}; "
                f"use data made with the model's tokenizer"
            )
        return ids.astype(np.int32), []


def check_length(n_tokens: int, n_ctx: int, name: str) -> None:
    """See that a row of token ids is a sequence.

    Raises:
        UserError: It is not `n_ctx` long.
    """
    if n_tokens != n_ctx:
        raise UserError(
            f"n_ctx: a row of '{name}' has {n_tokens} tokens, not {n_ctx}; set n_ctx to the length "
            f"of the rows, or tokenize the data again"
        )


@dataclass(frozen=True)
class Place:
    """Place in the sequences: a block, and how far it has been given out.

    Attributes:
        epoch: Passes over the data before this one.
        block: Blocks of this epoch before this one.
        position: Position in the documents of the chunk in which the block begins.
        remainder: Tokens left over before that chunk.
        n_skipped: Sequences of that chunk that belong to earlier blocks.
        n_given: Sequences of the block that have been given out, in its shuffled order.
    """

    epoch: int = 0
    block: int = 0
    position: Position | None = None
    remainder: list[int] = field(default_factory=list)
    n_skipped: int = 0
    n_given: int = 0


START = Place()

PlacedChunk = tuple[Place, Sequences]
"""Sequences of a chunk, and where it begins; its `block` and `n_given` are not set."""


@dataclass(frozen=True)
class TokenSequences:
    """Batches of token sequences: `n_epochs` passes over documents, shuffled block by block.

    A thread reads a block ahead of the one that is given out, so at most two are held.

    Attributes:
        documents: The text or token ids.
        pack: Makes sequences of them.
        batch_size: Sequences in a batch. What is left for a last, shorter one is left out.
        n_epochs: None: no end.
        block_samples: Sequences in a block.
        seed: The order is a function of it and of the epoch.
        name: What to call the data in messages.
    """

    documents: Documents
    pack: Pack
    batch_size: int
    n_epochs: int | None
    block_samples: int
    seed: int
    name: str

    def batches(self, start: Place = START) -> Generator[tuple[Place, Sequences], None, None]:
        """Iterate over the batches from `start` on, each with the place behind it.

        Raises:
            UserError: There is not one batch from `START` on, or the data are not as configured.
        """
        rows: list[Int32[np.ndarray, " pos"]] = []
        has_given = False
        n_given = start.n_given
        chunks = ReadAhead(self._chunks(start), lambda chunk: len(chunk[1]), self.block_samples)
        with closing(chunks):
            for place, sequences in _blocks(chunks, start.block, self.block_samples):
                order = self._rng(place.epoch, place.block).permutation(len(sequences))
                for index in order[n_given:]:
                    rows.append(sequences[index])
                    n_given += 1
                    if len(rows) == self.batch_size:
                        yield replace(place, n_given=n_given), np.stack(rows)
                        has_given, rows = True, []
                n_given = 0
        if start == START and not has_given:
            raise UserError(self._too_few(len(rows)))

    def samples_by_chunk(self) -> Iterator[int]:
        """Count the sequences of each chunk of one epoch; they are read for it."""
        return (len(sequences) for _, sequences in self._chunks_of_epoch(START))

    def _rng(self, *stage: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stage])

    def _too_few(self, n_samples: int) -> str:
        return (
            f"dataset_name: '{self.name}' holds {n_samples} sequences, less than one batch of "
            f"{self.batch_size}; use more data, a smaller n_ctx or a smaller batch_size"
        )

    def _chunks(self, place: Place) -> Iterator[PlacedChunk]:
        """Iterate over the chunks from `place` on, of this epoch and the later ones."""
        while self.n_epochs is None or place.epoch < self.n_epochs:
            is_empty = place.position is None and place.n_skipped == 0
            for here, sequences in self._chunks_of_epoch(place):
                is_empty = is_empty and len(sequences) == 0
                yield here, sequences
            if is_empty:
                raise UserError(self._too_few(0))
            place = Place(epoch=place.epoch + 1)

    def _chunks_of_epoch(self, place: Place) -> Iterator[PlacedChunk]:
        # Sequences to skip may reach into later chunks, if the chunks were longer when the place
        # was saved.
        for chunk in self.documents.chunks(self._rng(place.epoch), place.position):
            sequences, remainder = self.pack(chunk, place.remainder)
            yield place, sequences
            n_to_skip = max(0, place.n_skipped - len(sequences))
            place = Place(place.epoch, 0, chunk.next, remainder, n_to_skip)


def _blocks(
    chunks: Iterator[PlacedChunk], block: int, block_samples: int
) -> Iterator[tuple[Place, Sequences]]:
    """Blocks of chunks, with where each begins. The last one of an epoch may be short.

    Args:
        chunks: See `PlacedChunk`.
        block: Number of the first one in its epoch.
        block_samples: Sequences in a block.
    """
    for _, chunks_of_epoch in groupby(chunks, lambda chunk: chunk[0].epoch):
        parts: list[Sequences] = []
        begin, n_missing = START, block_samples
        for here, sequences in chunks_of_epoch:
            n_taken = min(here.n_skipped, len(sequences))
            while n_taken < len(sequences):
                if not parts:
                    begin = Place(here.epoch, block, here.position, here.remainder, n_taken)
                parts.append(sequences[n_taken : n_taken + n_missing])
                n_taken += len(parts[-1])
                n_missing -= len(parts[-1])
                if n_missing == 0:
                    yield begin, np.concatenate(parts)
                    parts, n_missing, block = [], block_samples, block + 1
        if parts:
            yield begin, np.concatenate(parts)
        block = 0
