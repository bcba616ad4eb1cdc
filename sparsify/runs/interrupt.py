"""Ctrl-C and SIGTERM that take effect between two steps, where what is saved fits together."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# What a signal does by itself, if nobody has changed it.
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextmanager
def interrupt_says(message: str) -> Iterator[None]:
    """A context that Ctrl-C and SIGTERM leave at once, with a message.

    Raises:
        KeyboardInterrupt: For either, with `message`.
    """

    def leave(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    is_ours = is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if is_ours:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(message) from None
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def held_interrupt(message: str = "") -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C and SIGTERM back to the end of the block, which is given a way to ask for them.

    A second one acts at once. Nothing is held outside the main thread, nor a signal that does
    something else already.

    Raises:
        KeyboardInterrupt: At the end of the block, with `message`, if one was held.
    """
    held: list[int] = []

    def hold(signal_number: int, _: FrameType | None) -> None:
        held.append(signal_number)
        restore()

    def restore() -> None:
        for number, default in DEFAULTS.items():
            if signal.getsignal(number) is hold:
                signal.signal(number, default)

    if threading.current_thread() is threading.main_thread():
        for number, default in DEFAULTS.items():
            if signal.getsignal(number) == default:
                signal.signal(number, hold)
    try:
        yield lambda: bool(held)
    finally:
        if threading.current_thread() is threading.main_thread():
            restore()
    if held:
        raise KeyboardInterrupt(message)
