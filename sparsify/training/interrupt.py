"""Ctrl-C that takes effect between two training steps, where what is saved fits together."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back to the end of the block, which is given a way to ask for it.

    A second Ctrl-C acts at once. Nothing is held outside the main thread, or where Ctrl-C does
    something else than to raise `KeyboardInterrupt`.
    """
    held: list[int] = []

    def hold(signal_number: int, _: object) -> None:
        held.append(signal_number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: bool(held)
    finally:
        if signal.getsignal(signal.SIGINT) is hold:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if held:
        raise KeyboardInterrupt
