import errno
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from sparsify.data import faults
from sparsify.data.config import DataConfig
from sparsify.data.documents import Chunk, Documents
from sparsify.data.shard_rows import ShardRows
from sparsify.data.sources import open_documents
from sparsify.settings.base_config import UserError

pytestmark = pytest.mark.fault

Raise = Callable[[int], None]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "RETRY_DELAYS_S", (0.0, 0.0))


def flaky_rows(failures: dict[int, list[Exception]]) -> Callable[[], IterableDataset]:
    """Makes a shard of 20 rows; before a row, the errors listed for it come, one in each try."""

    def rows(first: int, failures: Callable[[], dict[int, list[Exception]]]) -> Iterator[Any]:
        for number in range(first, 20):
            if failures().get(number):
                raise failures()[number].pop()
            yield {"text": str(number)}

    # A function, since `datasets` copies the arguments of a generator.
    arguments = {"first": 0, "failures": lambda: failures}
    return lambda: IterableDataset.from_generator(rows, gen_kwargs=arguments)


def texts_of(rows: ShardRows) -> list[str]:
    return [row["text"] for row in rows]


NUMBERS = [str(number) for number in range(20)]


@pytest.mark.parametrize("n_errors", [1, 2])
def test_no_row_is_lost_or_repeated_after_an_error(n_errors: int):
    for row in (0, 1, 7, 19):
        errors: list[Exception] = [ConnectionError("reset") for _ in range(n_errors)]
        assert texts_of(ShardRows(flaky_rows({row: errors}), None, "rows", None)) == NUMBERS
        assert errors == []


def test_rows_in_between_reset_the_count_of_tries():
    failures: dict[int, list[Exception]] = {
        row: [TimeoutError(), TimeoutError()] for row in (3, 4, 9)
    }
    assert texts_of(ShardRows(flaky_rows(failures), None, "rows", None)) == NUMBERS


@pytest.mark.parametrize("row", [2, 5, 8])
def test_state_is_exact_before_and_after_an_error(row: int):
    rows = ShardRows(flaky_rows({row: [ConnectionError("reset")]}), None, "rows", None)
    given = iter(rows)
    assert [next(given)["text"] for _ in range(4)] == NUMBERS[:4]
    rows.state_dict()
    assert [next(given)["text"] for _ in range(3)] == NUMBERS[4:7]
    state = rows.state_dict()
    assert [row["text"] for row in given] == NUMBERS[7:]
    assert texts_of(ShardRows(flaky_rows({}), state, "rows", None)) == NUMBERS[7:]


def test_after_the_last_try_there_is_one_message():
    errors: list[Exception] = [ConnectionError("no\nroute") for _ in range(9)]
    rows = ShardRows(flaky_rows({5: errors}), None, "user/data", None)
    given: list[str] = []
    message = (
        "^dataset_name: 'user/data' cannot be read to its end, tried 3 times: no route; "
        "check the network, then resume the run from its last checkpoint$"
    )
    with pytest.raises(UserError, match=message):
        given.extend(row["text"] for row in rows)
    assert len(errors) == 6


def test_an_error_that_lasts_is_not_tried_again():
    errors: list[Exception] = [ValueError("damaged"), ValueError("again")]
    with pytest.raises(UserError, match=r"'rows' cannot be read to its end: again; replace or rem"):
        texts_of(ShardRows(flaky_rows({5: errors}), None, "rows", None))
    assert len(errors) == 1


def test_a_disk_that_stays_away_is_named():
    errors: list[Exception] = [OSError(errno.EIO, "Input/output error") for _ in range(9)]
    message = (
        "'/data/0.jsonl', a file of '/data', cannot be read, tried 3 times: .*error; make it reada"
    )
    with pytest.raises(UserError, match=message):
        texts_of(ShardRows(flaky_rows({5: errors}), None, "/data", "/data/0.jsonl"))


def write_parquet(path: Path, texts: list[str]) -> None:
    # Small groups of rows, so that a file is not read at once.
    Dataset.from_dict({"text": texts}).to_parquet(path, batch_size=20)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3 - 1])


def flip_bytes(path: Path) -> None:
    content = path.read_bytes()
    middle = content[len(content) // 4 :]
    path.write_bytes(content[: len(content) // 4] + bytes(byte ^ 0xFF for byte in middle))


@pytest.fixture(params=["parquet", "jsonl"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with three files of 300 rows."""
    write = {"parquet": write_parquet, "jsonl": write_jsonl}[request.param]
    folder = tmp_path / "table"
    folder.mkdir()
    for number in range(3):
        texts = [f"file {number} row {row} " + "x" * (row % 50) for row in range(300)]
        write(folder / f"{number}.{request.param}", texts)
    return folder


def chunks(documents: Documents) -> Iterator[Chunk]:
    return documents.chunks(np_generator(), None)


def np_generator() -> Any:
    import numpy as np

    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("damage", "remedy"),
    [
        (delete, "restore it, then resume the run"),
        (truncate, "replace the damaged file, then resume"),
        (flip_bytes, "replace the damaged file, then resume"),
    ],
)
def test_file_that_is_damaged_while_it_is_in_use_is_named(
    damage: Callable[[Path], None], remedy: str, table: Path
):
    config = DataConfig(dataset_name=str(table), n_ctx=4)
    [last] = [
        path for path in table.iterdir() if path.stem == str(np_generator().permutation(3)[2])
    ]
    given = chunks(open_documents(config))
    assert len(list(islice(given, 3))) == 3  # two files at most, whose chunks are of 256 rows
    damage(last)
    with pytest.raises(UserError) as error:
        list(given)
    message = str(error.value)
    assert message.startswith(f"dataset_name: '{last}', a file of '{table}', cannot be read: ")
    assert remedy in message
    assert "\n" not in message


def test_single_file_that_vanishes_is_named(tmp_path: Path):
    path = tmp_path / "table.jsonl"
    write_jsonl(path, ["text"] * 10)
    documents = open_documents(DataConfig(dataset_name=str(path), n_ctx=4))
    path.unlink()
    message = rf"^dataset_name: '{path}' cannot be read: it is no longer there; restore it, then re"
    with pytest.raises(UserError, match=message):
        list(chunks(documents))
