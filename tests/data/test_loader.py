import io
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsify.data import documents, faults
from sparsify.data.config import DataConfig
from sparsify.data.documents import TableRows
from sparsify.data.loader import TokenLoader, build_loader
from sparsify.data.tokens import TextPacker, TokenSequences
from sparsify.settings.base_config import UserError


@pytest.fixture(params=["files", "table", "ids"])
def data(request: pytest.FixtureRequest, tmp_path: Path, texts: list[str]) -> dict[str, Any]:
    """Config fields of the same amount of data in three forms."""
    if request.param == "files":
        return {"dataset_name": str(request.getfixturevalue("source_tree"))}
    path = tmp_path / "table.parquet"
    ids = [[index, *range(7)] for index in range(140)]
    columns = {"text": texts} if request.param == "table" else {"input_ids": ids}
    Dataset.from_dict(columns).to_parquet(path, batch_size=16)
    return {"dataset_name": str(path), "is_tokenized": request.param == "ids"}


def build(
    data: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    **fields: Any,
) -> TokenLoader:
    options = {"n_ctx": 8, "shuffle_block_samples": 30, **data, **fields}
    config = DataConfig.model_validate(options)
    return build_loader(config, batch_size=4, tokenizer=tokenizer, seed=0, d_vocab=300)


def as_lists(batches: list[Tensor]) -> list[list[list[int]]]:
    return [batch.tolist() for batch in batches]


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_batches_are_whole_and_int64(data: dict[str, Any], tokenizer: PreTrainedTokenizerFast):
    batches = list(build(data, tokenizer))
    assert len(batches) > 20
    assert {tuple(batch.shape) for batch in batches} == {(4, 8)}
    assert {batch.dtype for batch in batches} == {torch.int64}


def test_the_seed_of_the_config_goes_before_the_one_of_the_run(
    source_tree: Path, tokenizer: PreTrainedTokenizerFast
):
    data = {"dataset_name": str(source_tree)}
    same, other = build(data, tokenizer, seed=0), build(data, tokenizer, seed=1)
    batches = as_lists(list(build(data, tokenizer)))
    assert batches == as_lists(list(same))
    assert batches != as_lists(list(other))


def test_each_iteration_starts_from_the_beginning(
    data: dict[str, Any], tokenizer: PreTrainedTokenizerFast
):
    loader = build(data, tokenizer)
    first = as_lists(list(islice(loader, 5)))
    assert as_lists(list(loader))[:5] == first
    assert as_lists(list(loader))[:5] == first


@pytest.mark.parametrize("n_epochs", [2, None])
def test_resumed_loader_gives_the_rest(
    data: dict[str, Any], n_epochs: int | None, tokenizer: PreTrainedTokenizerFast
):
    n_total = 2 * len(list(build(data, tokenizer)))
    expected = as_lists(list(islice(build(data, tokenizer, n_epochs=n_epochs), n_total)))
    for n_before in (0, 5, n_total // 2 + 1):
        loader = build(data, tokenizer, n_epochs=n_epochs)
        assert as_lists(list(islice(loader, n_before))) == expected[:n_before]
        resumed = build(data, tokenizer, n_epochs=n_epochs)
        resumed.load_state_dict(saved_and_loaded(loader.state_dict()))
        rest = as_lists(list(islice(resumed, len(expected) - n_before)))
        assert rest == expected[n_before:]


def test_loader_saved_at_its_end_stays_there_once(
    source_tree: Path, tokenizer: PreTrainedTokenizerFast
):
    data = {"dataset_name": str(source_tree)}
    loader = build(data, tokenizer)
    n_batches = len(list(loader))
    resumed = build(data, tokenizer)
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []
    assert len(list(resumed)) == n_batches


def test_an_error_comes_after_the_batches_before_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(documents, "CHUNK_DOCUMENTS", 8)
    Dataset.from_dict({"input_ids": [[1] * 8] * 40 + [[1] * 9]}).to_parquet(tmp_path / "t.parquet")
    data = {"dataset_name": str(tmp_path / "t.parquet"), "is_tokenized": True}
    given = iter(build(data, tokenizer, shuffle_block_samples=4))
    assert len(list(islice(given, 10))) == 10
    with pytest.raises(UserError, match="has 9 tokens, not 8"):
        next(given)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_closed_after_an_error_it_reads_no_more_and_keeps_its_state(
    data: dict[str, Any], tokenizer: PreTrainedTokenizerFast
):
    expected = as_lists(list(islice(build(data, tokenizer, n_epochs=None), 12)))
    assert reading_threads() == []
    loader = build(data, tokenizer, n_epochs=None)
    loader.close()  # does no harm before an iteration
    given: list[Tensor] = []

    def train() -> None:
        batches = iter(loader)
        given.extend(islice(batches, 5))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        train()
    assert len(reading_threads()) == 1  # as the error's traceback holds `batches`
    loader.close()
    assert reading_threads() == []
    assert error.traceback
    resumed = build(data, tokenizer, n_epochs=None)
    resumed.load_state_dict(loader.state_dict())
    assert as_lists(given + list(islice(resumed, 7))) == expected


def test_the_tokenizer_can_be_used_while_the_loader_reads(
    source_tree: Path, tokenizer: PreTrainedTokenizerFast
):
    loader = build({"dataset_name": str(source_tree)}, tokenizer, n_epochs=None)
    expected = as_lists(list(islice(loader, 200)))
    given: list[Tensor] = []
    for batch in islice(loader, 200):
        given.append(batch)
        # Changes settings of the tokenizer.
        tokenizer("a<|endoftext|>b", truncation=True, max_length=2, split_special_tokens=False)
    assert as_lists(given) == expected


def test_loader_leaves_the_global_random_state_alone(
    source_tree: Path, tokenizer: PreTrainedTokenizerFast
):
    before = torch.get_rng_state()
    list(build({"dataset_name": str(source_tree)}, tokenizer))
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_late_row_is_reported_in_one_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    Dataset.from_dict({"input_ids": [[1] * 8] * 5 + [[1] * 9]}).to_parquet(tmp_path / "t.parquet")
    data = {"dataset_name": str(tmp_path / "t.parquet"), "is_tokenized": True}
    with pytest.raises(UserError, match=r"^n_ctx: a row of '.*' has 9 tokens, not 8; [^\n]*$"):
        list(build(data, tokenizer))


def test_table_with_a_damaged_later_file_is_reported_in_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    (tmp_path / "table").mkdir()
    Dataset.from_dict({"text": ["X" * 20]}).to_parquet(tmp_path / "table" / "0.parquet")
    (tmp_path / "table" / "1.parquet").write_text("no parquet")
    message = r"^dataset_name: '.*table.1.parquet', a file of [^\n]*; replace the damaged [^\n]*$"
    with pytest.raises(UserError, match=message):
        build({"dataset_name": str(tmp_path / "table")}, tokenizer)


class _Flaky:
    """Rows of a table, with an error before some of them, each only once."""

    def __init__(self, texts: list[str], fault_dir: Path, fails_before: list[int]) -> None:
        self.texts = texts
        self.fault_dir = fault_dir  # a file there marks an error that has come, in any process
        self.fails_before = fails_before

    def __call__(self) -> Iterator[dict[str, str]]:
        for number, text in enumerate(self.texts):
            mark = self.fault_dir / str(number)
            if number in self.fails_before and not mark.exists():
                mark.touch()
                raise ConnectionError("the connection was reset")
            yield {"text": text}


def flaky_loader(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, flaky: _Flaky
) -> TokenLoader:
    rows = IterableDataset.from_generator(flaky)
    sequences = TokenSequences(
        TableRows(rows, "text", is_tokenized=False, name="flaky"),
        TextPacker(tokenizer, 8, 0, None),
        batch_size=4,
        n_epochs=2,
        block_samples=30,
        seed=0,
        name="flaky",
    )
    return TokenLoader(sequences)


def test_batches_and_states_are_the_same_in_spite_of_a_transient_error(
    tmp_path: Path,
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(faults, "RETRY_DELAYS_S", (0.0,))
    monkeypatch.setattr(documents, "CHUNK_DOCUMENTS", 7)
    (tmp_path / "marks").mkdir()

    def load(fails_before: list[int]) -> TokenLoader:
        flaky = _Flaky(texts, tmp_path / "marks", fails_before)
        return flaky_loader(texts, tokenizer, flaky)

    expected = list(load([]))
    loader = load([0, 9, 10, 39])
    given = iter(loader)
    first = list(islice(given, 11))
    state = saved_and_loaded(loader.state_dict())
    rest = list(given)
    assert len(list((tmp_path / "marks").iterdir())) == 4
    assert len(expected) > 22
    assert as_lists(first + rest) == as_lists(expected)
    resumed = load([])
    resumed.load_state_dict(state)
    assert as_lists(list(resumed)) == as_lists(expected[11:])


def test_rows_of_another_length_are_rejected_at_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    Dataset.from_dict({"input_ids": [[1] * 9] * 5}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"n_ctx: a row of '.*t.parquet' has 9 tokens, not 8; set"):
        build({"dataset_name": str(tmp_path / "t.parquet"), "is_tokenized": True}, tokenizer)


def test_short_text_without_one_batch_is_rejected(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    (tmp_path / "a.txt").write_text("X" * 20)
    with pytest.raises(UserError, match=r"a.txt' holds 2 sequences, less than one batch of 4; use"):
        build({"dataset_name": str(tmp_path / "a.txt")}, tokenizer)


def test_table_without_one_batch_is_rejected(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    Dataset.from_dict({"text": ["X" * 20]}).to_parquet(tmp_path / "t.parquet")
    loader = build({"dataset_name": str(tmp_path / "t.parquet")}, tokenizer)
    with pytest.raises(UserError, match=r"t.parquet' holds 2 sequences, less than one batch of 4"):
        list(loader)


def refusal(tokenizer: PreTrainedTokenizerBase | None, **options: Any) -> str:
    fields = options.pop("fields", {})
    config = DataConfig(dataset_name="python-stdlib", n_ctx=8, **fields)
    with pytest.raises(UserError) as error:
        build_loader(config, batch_size=4, tokenizer=tokenizer, seed=0, **options)
    return str(error.value)


def test_data_that_do_not_suit_the_model_are_rejected(tokenizer: PreTrainedTokenizerFast):
    assert refusal(tokenizer, model_n_ctx=4).startswith(
        "n_ctx: 8 is beyond the model's context of 4; use at most 4"
    )
    message = refusal(tokenizer, d_vocab=299, fields={"tokenizer_name": "mine"})
    assert "'mine' has token ids up to 299, but the model's vocabulary has 299 ids" in message
    assert "text needs a tokenizer and the model has none; name one" in refusal(None)


def test_slow_tokenizer_is_rejected():
    message = "tokenizer_name: 'bytes' has no fast version (tokenizer.json); use one that has"
    assert refusal(ByT5Tokenizer(), fields={"tokenizer_name": "bytes"}) == message


def test_tokenizer_without_the_tokens_that_are_needed_is_rejected(
    tokenizer: PreTrainedTokenizerFast,
):
    backend = tokenizer.backend_tokenizer
    bare = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert "has no end-of-text token of its own to put between documents" in refusal(bare)
    no_bos = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    message = refusal(no_bos, fields={"add_bos_token": True})
    assert message.startswith(
        "add_bos_token: 'the model's tokenizer' has no BOS token of its own; set"
    )


@pytest.mark.parametrize(
    "change",
    [
        *(
            {name: value}
            for name in ("epoch", "block", "n_skipped", "n_given")
            for value in (-1, "1")
        ),
        *({"epoch": True}, {"block": 2**63}, {"n_given": 1.0}, {"n_skipped": None}),
        *({"position": [1]}, {"position": "ab"}, {"position": [-1, 0]}, {"position": [1, "x"]}),
        *({"position": [1, {"a": torch.ones(1)}]}, {"position": {0: 1, 1: 2}}),
        *({"remainder": [300]}, {"remainder": [-1]}, {"remainder": [True]}, {"remainder": (1, 2)}),
    ],
    ids=str,
)
def test_a_state_that_is_no_place_is_refused(
    change: dict[str, Any], data: dict[str, Any], tokenizer: PreTrainedTokenizerFast
):

    loader = build_loader(
        DataConfig.model_validate({"n_ctx": 8, **data}),
        batch_size=2,
        tokenizer=tokenizer,
        seed=0,
        d_vocab=300,
    )
    state = loader.state_dict()
    loader.load_state_dict(state)
    with pytest.raises(ValueError, match=r"^loader\."):
        loader.load_state_dict({**state, **change})


def test_a_state_that_holds_itself_is_refused(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "table.parquet")
    config = DataConfig(dataset_name=str(tmp_path / "table.parquet"), n_ctx=8)
    loader = build_loader(config, batch_size=2, tokenizer=tokenizer, seed=0)
    ring: dict[str, Any] = {}
    ring["more"] = [ring, ring]
    with pytest.raises(ValueError, match="has no plain state of a table"):
        loader.load_state_dict({**loader.state_dict(), "position": [0, ring]})
