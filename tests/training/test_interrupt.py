import signal

import pytest

from sparsify.training.interrupt import held_interrupt


def test_second_ctrl_c_acts_at_once():
    reached: list[bool] = []

    def press_twice() -> None:
        with held_interrupt() as is_interrupted:
            signal.raise_signal(signal.SIGINT)
            reached.append(is_interrupted())
            signal.raise_signal(signal.SIGINT)
            reached.append(False)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert reached == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
