import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count, islice

import pytest

from sparsify.data.read_ahead import ReadAhead


def ahead(items: Iterator[int], max_size: int = 3) -> ReadAhead[int]:
    return ReadAhead(items, lambda _: 1, max_size)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_items_come_in_order_and_end():
    items = ahead(iter(range(100)))
    assert list(items) == list(range(100))
    assert list(items) == []


def test_items_are_made_in_one_other_thread():
    makers = set(ReadAhead((threading.get_ident() for _ in range(9)), lambda _: 1, 3))
    assert len(makers) == 1
    assert makers != {threading.get_ident()}


@pytest.mark.parametrize(
    "error", [KeyError("as it was"), BaseException("of native code")], ids=repr
)
def test_an_error_comes_as_it_was_after_the_items_before_it(error: BaseException):
    def items() -> Iterator[int]:
        yield from range(10)
        raise error

    found = ahead(items())
    assert list(islice(found, 10)) == list(range(10))
    with pytest.raises(type(error)) as raised:
        next(found)
    assert raised.value is error
    assert list(found) == []


def test_the_size_that_is_ahead_is_bounded():
    made: list[int] = []
    was_full = threading.Event()

    def items() -> Iterator[int]:
        for number in count():
            made.append(number)
            if number == 3:
                was_full.set()
            yield number

    # Sizes 2, 2, 2: with three of them, 5 is exceeded, and the fourth begins when one is taken.
    found = ReadAhead(items(), lambda _: 2, 5)
    assert not was_full.wait(0.05)
    assert made == [0, 1, 2]
    assert next(found) == 0
    assert was_full.wait(10)
    found.close()


@pytest.mark.parametrize("n_taken", [0, 1, 10])
def test_closed_its_thread_has_ended_and_there_are_no_more_items(n_taken: int):
    items = ahead(count())
    assert len(list(islice(items, n_taken))) == n_taken
    items.close()
    assert reading_threads() == []
    assert list(items) == []
    items.close()


def test_dropped_its_thread_has_ended():
    items = ahead(count())
    next(items)
    assert len(reading_threads()) == 1
    del items
    assert reading_threads() == []


PROGRAM = """
import time
from itertools import count
from sparsify.data.read_ahead import ReadAhead
{item}
items = ReadAhead(map(make, count()), lambda _: 1, {max_size})
assert next(items) == 0
print("reads", flush=True)
{end}
"""
QUICK = "make = int"
SLOW = "make = lambda number: number and time.sleep(0.2) or number"
HANGS = """
import sparsify.data.read_ahead
sparsify.data.read_ahead.CLOSE_SECONDS = 0.1
make = lambda number: number and time.sleep(1000) or number
"""


@pytest.mark.parametrize("item", [QUICK, SLOW, HANGS], ids=["waits", "reads", "hangs"])
@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("raise ValueError", 1), ("time.sleep(1000)", -signal.SIGINT)],
    ids=["end", "error", "ctrl-c"],
)
def test_a_process_ends_though_its_items_are_left(item: str, end: str, code: int):
    program = PROGRAM.format(item=item, max_size=100 if item == SLOW else 2, end=end)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reads\n"
        if code == -signal.SIGINT:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert ("KeyboardInterrupt" in errors, "ValueError" in errors) == (code < 0, code > 0)
