"""Documents to sequences of tokens, in a shuffled order that can be resumed exactly.

Sequences are cut from the stream of documents, collected into blocks, and each block is shuffled.
So memory is bounded, no sequence comes twice in an epoch, and the place in the data is small: where
the block begins, and how many of its sequences have been given out.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Int32
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from sparsify.data.documents import Chunk, Documents, Position
from sparsify.settings.base_config import UserError

Sequences = Int32[np.ndarray, "sample pos"]
Pack = Callable[[Chunk, list[int]], tuple[Sequences, list[int]]]
"""Cuts a chunk, preceded by the tokens left over from the one before, into sequences; returns
these and the tokens left over."""


@dataclass(frozen=True)
class TextPacker:
    """Puts an end-of-text token behind each document and cuts every `n_ctx` tokens.

    Attributes:
        bos_token_id: First token of every sequence. None: a sequence is text only.
    """

    tokenizer: PreTrainedTokenizerBase
    n_ctx: int
    eos_token_id: int
    bos_token_id: int | None

    def __call__(self, chunk: Chunk, remainder: list[int]) -> tuple[Sequences, list[int]]:
        """See `Pack`."""
        # What looks like a special token in a document is text.
        ids: list[list[int]] = self.tokenizer(
            chunk.documents,  # pyright: ignore[reportArgumentType]  # texts; ids have their own packer
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        ends = [[self.eos_token_id]] * len(ids)
        if chunk.is_cut:
            ends[-1] = []
        pieces = chain.from_iterable(zip(ids, ends, strict=True))
        tokens = np.fromiter(chain(remainder, *pieces), dtype=np.int32)
        n_text = self.n_ctx - (self.bos_token_id is not None)
        n_used = len(tokens) // n_text * n_text
        sequences = tokens[:n_used].reshape(-1, n_text)
        if self.bos_token_id is not None:
            sequences = np.insert(sequences, 0, self.bos_token_id, axis=1)
        return sequences, tokens[n_used:].tolist()


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
    """Where a block of sequences begins.

    Attributes:
        epoch: Passes over the data before this one.
        block: Blocks of this epoch before this one.
        position: Position in the documents of the chunk in which the block begins.
        remainder: Tokens left over before that chunk.
        n_skipped: Sequences of that chunk that belong to earlier blocks.
    """

    epoch: int = 0
    block: int = 0
    position: Position | None = None
    remainder: list[int] = field(default_factory=list)
    n_skipped: int = 0


class TokenSequences(IterableDataset[Int32[np.ndarray, " pos"]]):
    """Sequences of tokens: `n_epochs` passes over documents, shuffled block by block.

    In a worker process the next block is read while one is given out, so at most two are held.
    An iteration starts at the beginning, or where `load_state_dict` said.

    Args:
        documents: The text or token ids.
        pack: Makes sequences of them.
        n_epochs: None: no end.
        block_samples: Sequences in a block.
        seed: The order is a function of it and of the epoch.
        name: What to call the data in messages.
        min_samples: Fewer sequences than this in all are an error.
    """

    def __init__(
        self,
        documents: Documents,
        pack: Pack,
        *,
        n_epochs: int | None,
        block_samples: int,
        seed: int,
        name: str,
        min_samples: int = 1,
    ) -> None:
        super().__init__()
        self.documents = documents
        self.pack = pack
        self.n_epochs = n_epochs
        self.block_samples = block_samples
        self.seed = seed
        self.name = name
        self.min_samples = min_samples
        self._place, self._n_given = Place(), 0
        self._is_resumed = False

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, in plain data."""
        return {**asdict(self._place), "n_given": self._n_given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where `state_dict` was called."""
        fields = dict(state)
        self._n_given = fields.pop("n_given")
        self._place = Place(**fields)
        self._is_resumed = (self._place, self._n_given) != (Place(), 0)

    def __iter__(self) -> Iterator[Int32[np.ndarray, " pos"]]:
        """See the class.

        Raises:
            UserError: The data hold fewer than `min_samples` sequences, or are not as configured.
        """
        is_resumed, self._is_resumed = self._is_resumed, False
        if not is_resumed:
            self._place, self._n_given = Place(), 0
        n_total, n_given = 0, self._n_given
        blocks = self._blocks(self._place)
        for place, sequences in _read_ahead(blocks) if get_worker_info() else blocks:
            order = self._rng(place.epoch, place.block).permutation(len(sequences))
            for index in order[n_given:]:
                n_given += 1
                self._place, self._n_given = place, n_given
                yield sequences[index]
            n_given = 0
            n_total += len(sequences)
        if n_total < self.min_samples and not is_resumed:
            raise UserError(self._too_few(n_total))

    def samples_by_chunk(self) -> Iterator[int]:
        """How many sequences each chunk of one epoch gives. The iteration stays where it is."""
        return (len(sequences) for _, sequences in self._packed_chunks(Place()))

    def _rng(self, *stage: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stage])

    def _too_few(self, n_samples: int) -> str:
        return (
            f"dataset_name: '{self.name}' holds {n_samples} sequences, less than one batch of "
            f"{self.min_samples}; use more data, a smaller n_ctx or a smaller batch_size"
        )

    def _blocks(self, place: Place) -> Iterator[tuple[Place, Sequences]]:
        while self.n_epochs is None or place.epoch < self.n_epochs:
            is_empty = place == Place(place.epoch)
            for block in self._blocks_of_epoch(place):
                is_empty = False
                yield block
            if is_empty:
                raise UserError(self._too_few(0))
            place = Place(epoch=place.epoch + 1)

    def _blocks_of_epoch(self, place: Place) -> Iterator[tuple[Place, Sequences]]:
        begin, block = place, place.block
        parts: list[Sequences] = []
        n_missing = self.block_samples
        for here, sequences in self._packed_chunks(place):
            n_taken = min(here.n_skipped, len(sequences))
            while n_taken < len(sequences):
                if not parts:
                    begin = Place(here.epoch, block, here.position, here.remainder, n_taken)
                parts.append(sequences[n_taken : n_taken + n_missing])
                n_taken += len(parts[-1])
                n_missing -= len(parts[-1])
                if n_missing == 0:
                    yield begin, np.concatenate(parts)
                    parts, n_missing, block = [], self.block_samples, block + 1
        if parts:
            yield begin, np.concatenate(parts)

    def _packed_chunks(self, place: Place) -> Iterator[tuple[Place, Sequences]]:
        """Each chunk's sequences, with where the chunk begins (`block` is not set).

        Sequences to skip may reach into later chunks, if the chunks were longer when the place was
        saved.
        """
        for chunk in self.documents.chunks(self._rng(place.epoch), place.position):
            sequences, remainder = self.pack(chunk, place.remainder)
            yield place, sequences
            n_to_skip = max(0, place.n_skipped - len(sequences))
            place = Place(place.epoch, 0, chunk.next, remainder, n_to_skip)


def _read_ahead(
    blocks: Iterator[tuple[Place, Sequences]],
) -> Iterator[tuple[Place, Sequences]]:
    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming = reader.submit(next, blocks, None)
        while (block := upcoming.result()) is not None:
            upcoming = reader.submit(next, blocks, None)
            yield block
