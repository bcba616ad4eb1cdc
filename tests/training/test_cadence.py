from sparsify.training.cadence import Cadence, Every
from sparsify.training.config import TrainingConfig


def test_fires_when_a_multiple_is_passed():
    every = Every(10)
    assert [n for n in range(4, 41, 4) if every.due(n)] == [12, 20, 32, 40]


def test_does_not_fire_twice_for_one_count():
    every = Every(10)
    assert every.due(10)
    assert not every.due(10)


def test_fires_once_for_several_multiples_passed_at_once():
    every = Every(10)
    assert every.due(35)
    assert not every.due(39)
    assert every.due(40)


def test_none_never_fires():
    every = Every(None)
    assert not any(every.due(n) for n in range(100))


def test_resumed_cadence_fires_where_the_whole_one_does():
    counts = range(3, 100, 3)
    whole = Every(7)
    fired = [n for n in counts if whole.due(n)]
    for start in (0, *counts):
        resumed = Every(7, start=start)
        assert [n for n in counts if n > start and resumed.due(n)] == [
            n for n in fired if n > start
        ]


def test_log_period_counts_optimizer_steps():
    config = TrainingConfig(
        n_samples=64, batch_size=2, effective_batch_size=4, lr=1.0, log_every_n_grad_steps=3
    )
    cadence = Cadence.from_config(config)
    assert [n for n in range(2, 65, 2) if cadence.log.due(n)] == [12, 24, 36, 48, 60]
    assert not cadence.evaluate.due(64)
    assert not cadence.save.due(64)
