import copy
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sparsify.data import tokens as tokens_module
from sparsify.data.documents import Chunk, Position
from sparsify.data.tokens import START, IdPacker, Place, TextPacker, TokenSequences
from sparsify.settings.base_config import UserError


class InOrder:
    """Documents in chunks of `chunk_size`, in the order in which they were given."""

    def __init__(self, documents: list[str] | list[list[int]], chunk_size: int) -> None:
        self.documents = documents
        self.chunk_size = chunk_size

    def chunks(self, rng: np.random.Generator, position: Position | None) -> Iterator[Chunk]:
        begin = position[0] if position else 0
        while begin < len(self.documents):
            end = begin + self.chunk_size
            yield Chunk(self.documents[begin:end], [end])
            begin = end


def rows_of_ids(n_rows: int) -> list[list[int]]:
    """Rows of two ids; the first is the number of the row."""
    return [[index, 100] for index in range(n_rows)]


def id_sequences(
    n_rows: int,
    chunk_size: int = 3,
    n_epochs: int | None = 1,
    seed: int = 0,
    batch_size: int = 1,
) -> TokenSequences:
    return TokenSequences(
        InOrder(rows_of_ids(n_rows), chunk_size),
        IdPacker(2, "rows", d_vocab=101),
        batch_size=batch_size,
        n_epochs=n_epochs,
        block_samples=5,
        seed=seed,
        name="rows",
    )


def numbers(
    sequences: TokenSequences, start: Place = START, n_batches: int | None = None
) -> list[int]:
    batches = islice(sequences.batches(start), n_batches)
    return [int(number) for _, batch in batches for number in batch[:, 0]]


def place_after(n_batches: int, sequences: TokenSequences) -> Place:
    places = [START, *(place for place, _ in islice(sequences.batches(), n_batches))]
    return places[-1]


def letters(n_ctx: int, bos_token_id: int | None, tokenizer: PreTrainedTokenizerFast) -> TextPacker:
    return TextPacker(tokenizer, n_ctx, 0, bos_token_id)


def test_documents_are_joined_by_eos_and_cut(tokenizer: PreTrainedTokenizerFast):
    x, y, z = (tokenizer.convert_tokens_to_ids(letter) for letter in "XYZ")
    pack = letters(4, None, tokenizer)
    # XYX 0 Z 0 in sequences of four: "XYX 0", with "Z 0" left over.
    sequences, remainder = pack(Chunk(["XYX", "Z"], [2]), [])
    assert (sequences.tolist(), remainder) == ([[x, y, x, 0]], [z, 0])
    # Z 0 | Y, and the document continues: no end-of-text yet.
    sequences, remainder = pack(Chunk(["Y"], [3], is_cut=True), remainder)
    assert (sequences.tolist(), remainder) == ([], [z, 0, y])
    # Z 0 Y | X 0
    sequences, remainder = pack(Chunk(["X"], [4]), remainder)
    assert (sequences.tolist(), remainder) == ([[z, 0, y, x]], [0])


def test_bos_takes_one_place_of_every_sequence(tokenizer: PreTrainedTokenizerFast):
    x, y = (tokenizer.convert_tokens_to_ids(letter) for letter in "XY")
    sequences, remainder = letters(3, 7, tokenizer)(Chunk(["XYX", "Y"], [2]), [])
    assert (sequences.tolist(), remainder) == ([[7, x, y], [7, x, 0], [7, y, 0]], [])


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("bos_token_id", [None, 0])
def test_sequences_in_order_are_the_text(
    chunk_size: int, bos_token_id: int | None, tokenizer: PreTrainedTokenizerFast, texts: list[str]
):
    sequences = TokenSequences(
        InOrder(texts, chunk_size),
        letters(8, bos_token_id, tokenizer),
        batch_size=1,
        n_epochs=1,
        block_samples=1,
        seed=0,
        name="texts",
    )
    rows = np.concatenate([batch for _, batch in sequences.batches()])
    tokens = rows.reshape(-1) if bos_token_id is None else rows[:, 1:].reshape(-1)
    expected = "".join(text + "<|endoftext|>" for text in texts)
    decoded = tokenizer.decode(tokens)
    assert isinstance(decoded, str)
    assert expected.startswith(decoded)
    assert len(expected) - len(decoded) < 100  # less than one sequence is left over
    assert bos_token_id is None or (rows[:, 0] == bos_token_id).all()


def test_special_token_in_a_document_is_text(tokenizer: PreTrainedTokenizerFast):
    _, remainder = letters(1000, None, tokenizer)(Chunk(["a<|endoftext|>b"], [1]), [])
    assert remainder.count(0) == 1
    assert remainder[-1] == 0
    assert tokenizer.decode(remainder[:-1]) == "a<|endoftext|>b"


def test_each_sequence_comes_once_per_epoch_and_blocks_stay_together():
    given = numbers(id_sequences(23))
    assert sorted(given) == list(range(23))
    blocks = [given[start : start + 5] for start in range(0, 23, 5)]
    assert [sorted(block) for block in blocks] == [
        list(range(start, min(start + 5, 23))) for start in range(0, 23, 5)
    ]
    assert given != list(range(23))


def test_epochs_have_different_orders():
    given = numbers(id_sequences(23, n_epochs=2))
    assert sorted(given[:23]) == sorted(given[23:]) == list(range(23))
    assert given[:23] != given[23:]


def test_order_is_a_function_of_the_seed_and_not_of_the_chunks():
    assert numbers(id_sequences(23, seed=1)) == numbers(id_sequences(23, seed=1, chunk_size=8))
    assert numbers(id_sequences(23, seed=1)) != numbers(id_sequences(23, seed=2))


@pytest.mark.parametrize("chunk_size", [1, 5, 8, 100])
@pytest.mark.parametrize("n_epochs", [2, None])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_resumed_anywhere_it_gives_the_rest(chunk_size: int, n_epochs: int | None, batch_size: int):
    def build() -> TokenSequences:
        return id_sequences(13, chunk_size, n_epochs=n_epochs, batch_size=batch_size)

    n_total = 26 // batch_size
    expected = numbers(build(), n_batches=n_total)
    for n_before in range(n_total + 1):
        place = place_after(n_before, build())
        rest = numbers(build(), place, n_total - n_before)
        assert rest == expected[n_before * batch_size :]


def test_size_of_the_chunks_may_change_before_it_is_resumed():
    expected = numbers(id_sequences(23, chunk_size=23))
    place = place_after(12, id_sequences(23, chunk_size=23))
    assert numbers(id_sequences(23, chunk_size=4), place) == expected[12:]


def test_text_is_resumed_with_the_tokens_left_over(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
):
    sequences = TokenSequences(
        InOrder(texts, chunk_size=4),
        letters(8, None, tokenizer),
        batch_size=1,
        n_epochs=2,
        block_samples=50,
        seed=0,
        name="texts",
    )
    places, rows = zip(*sequences.batches(), strict=True)
    for n_before in range(1, len(rows), 61):
        rest = [row.tolist() for _, row in sequences.batches(places[n_before - 1])]
        assert rest == [row.tolist() for row in rows[n_before:]]


def test_batches_that_are_short_are_left_out():
    given = numbers(id_sequences(23, batch_size=4))
    assert given == numbers(id_sequences(23))[:20]


def test_settings_of_the_tokenizer_are_not_touched_and_have_no_effect(
    tokenizer: PreTrainedTokenizerFast,
):
    cut = copy.deepcopy(tokenizer)
    cut.backend_tokenizer.enable_truncation(2)
    cut.backend_tokenizer.enable_padding(length=9)
    before = cut.backend_tokenizer.to_str()
    chunk = Chunk(["XYX", "Z"], [2])
    assert letters(100, None, cut)(chunk, [])[1] == letters(100, None, tokenizer)(chunk, [])[1]
    assert cut.backend_tokenizer.to_str() == before
    assert not cut.backend_tokenizer.encode_special_tokens


def test_what_is_read_ahead_is_bounded():
    class Endless:
        n_chunks = 0

        def chunks(self, rng: np.random.Generator, position: Position | None) -> Iterator[Chunk]:
            while True:
                self.n_chunks += 1
                yield Chunk([[1, 2]] * 3, [0])

    documents = Endless()
    sequences = TokenSequences(
        documents,
        IdPacker(2, "rows", None),
        batch_size=1,
        n_epochs=None,
        block_samples=5,
        seed=0,
        name="rows",
    )
    with closing(sequences.batches()) as batches:
        list(islice(batches, 11))  # in the third block of 5, and so in the fifth chunk of 3
    assert 5 <= documents.n_chunks <= 7  # two chunks hold the block ahead


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2], [1, 2, 3]], "n_ctx: a row of 'rows' has 3 tokens, not 2; set n_ctx"),
        ([[1, 101]], "dataset_name: 'rows' has token id 101, but the model knows 101 ids; use"),
        ([[1, -1]], "dataset_name: 'rows' has token id -1, but ids start at 0; use data"),
    ],
)
def test_bad_rows_are_rejected(rows: list[list[int]], message: str):
    with pytest.raises(UserError, match=message):
        IdPacker(2, "rows", d_vocab=101)(Chunk(rows, [1]), [])


@pytest.mark.parametrize(("n_rows", "n_epochs"), [(3, 1), (0, 1), (0, None)])
def test_less_than_one_batch_is_rejected(n_rows: int, n_epochs: int | None):
    message = f"dataset_name: 'rows' holds {n_rows} sequences, less than one batch of 4; use more"
    with pytest.raises(UserError, match=message):
        numbers(id_sequences(n_rows, n_epochs=n_epochs, batch_size=4))


def test_a_very_long_text_is_made_tokens_in_pieces(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokens_module, "MAX_PIECE_CHARS", 10)
    lines = ["value = 1\n", "x\n", "return" * 5 + "\n", "end"]
    pieces = ["value = 1\n", "x\n", "returnretu", "rnreturnre", "turnreturn", "\nend"]
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    pack = TextPacker(tokenizer, 1, eos_token_id=0, bos_token_id=None)
    sequences, _ = pack(Chunk(["".join(lines)], [1]), [])
    assert sequences[:, 0].tolist() == [*(id for part in ids for id in part), 0]
