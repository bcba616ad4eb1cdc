"""Iterator whose items are made in a thread, before they are asked for."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

CLOSE_SECONDS = 5.0
"""Longest time to wait for the thread to end."""


class ReadAhead(Iterator[Item]):
    """Items of an iterator, which a thread takes from it ahead of the caller.

    An error of the iterator is raised in the place of its next item, after all items before it.
    The thread ends with the item that it is at when the `ReadAhead` is closed or dropped, or when
    the process ends.

    Args:
        items: The iterator. From now on it belongs to the thread.
        size: Size of an item.
        max_size: The thread waits while the items ahead have this size in all.
    """

    def __init__(self, items: Iterator[Item], size: Callable[[Item], int], max_size: int) -> None:
        self._shelf = _Shelf(items, size, max_size)
        # A daemon, so that a read that hangs does not keep the process from ending. Neither thread
        # nor finalizer holds this object, so that it can be dropped.
        thread = threading.Thread(target=self._shelf.fill, name="read-ahead", daemon=True)
        self._close = weakref.finalize(self, _close, self._shelf, thread)
        thread.start()

    def __next__(self) -> Item:
        """Return the next item, once it is there."""
        return self._shelf.take()

    def close(self) -> None:
        """End the thread; there are no more items."""
        self._close()


class _Shelf(Generic[Item]):
    """Place where the thread puts items and the caller takes them."""

    def __init__(self, items: Iterator[Item], size: Callable[[Item], int], max_size: int) -> None:
        self.items = items
        self.size = size
        self.max_size = max_size
        self.is_closed = False
        self.change = threading.Condition()
        self._ready: deque[Item] = deque()
        self._n_ready = 0  # their size
        self._end: BaseException | None = None  # what the iterator raised at last

    def fill(self) -> None:
        """Put item after item there, in the thread."""
        while self._has_room():
            try:
                item = next(self.items)
            # It is raised again where it is seen; also one of native code, which may not be an
            # `Exception`, as the caller would wait for ever.
            except BaseException as error:  # noqa: BLE001
                with self.change:
                    self._end = error
                    self.change.notify()
                return
            with self.change:
                self._ready.append(item)
                self._n_ready += self.size(item)
                self.change.notify()

    def _has_room(self) -> bool:
        """Wait for room; False if none is needed any more."""
        with self.change:
            self.change.wait_for(lambda: self.is_closed or self._n_ready < self.max_size)
            return not self.is_closed

    def take(self) -> Item:
        """Wait for an item and return it, or raise what ended them."""
        with self.change:
            self.change.wait_for(lambda: self._ready or self._end or self.is_closed)
            if self._ready and not self.is_closed:
                item = self._ready.popleft()
                self._n_ready -= self.size(item)
                self.change.notify()
                return item
            end, self._end = self._end, StopIteration()
            raise end or StopIteration


def _close(shelf: _Shelf[Item], thread: threading.Thread) -> None:
    with shelf.change:
        shelf.is_closed = True
        shelf.change.notify()
    # A process that ends while a tokenizer is at work in a thread may be aborted when that comes
    # back to Python. A thread that waits for a network longer than this does no harm.
    if thread is not threading.current_thread():
        thread.join(CLOSE_SECONDS)
