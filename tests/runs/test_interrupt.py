import signal

import pytest

from sparsify.runs.interrupt import held_interrupt, interrupt_says

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_ctrl_c_acts_at_once(first: signal.Signals):
    reached: list[bool] = []

    def press_twice() -> None:
        with held_interrupt() as is_interrupted:
            signal.raise_signal(first)
            reached.append(is_interrupted())
            signal.raise_signal(signal.SIGINT)
            reached.append(False)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert reached == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_held_signal_is_raised_at_the_end_with_the_message():
    def press() -> None:
        with held_interrupt("resume with: x") as is_interrupted:
            signal.raise_signal(signal.SIGTERM)
            assert is_interrupted()

    with pytest.raises(KeyboardInterrupt, match="resume with: x"):
        press()


def test_signals_that_do_something_already_are_left_alone():
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with held_interrupt() as is_interrupted:
            signal.raise_signal(signal.SIGTERM)
            assert not is_interrupted()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_at_once_has_its_message(number: int):
    with pytest.raises(KeyboardInterrupt, match="go on so"), interrupt_says("go on so"):
        signal.raise_signal(number)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
