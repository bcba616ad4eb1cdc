"""Thresholds that fit the weights at any time of training."""

import copy
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor

from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.saes.base import SAE
from sparsify.saes.batch_topk import BatchTopKSAE
from sparsify.saes.matryoshka import MatryoshkaSAE
from sparsify.saes.topk import TopKSAE
from sparsify.training.config import TrainingConfig
from sparsify.training.recent_batches import N_ROWS, N_SAMPLES, RecentBatches, drawn_rows
from sparsify.training.sae_trainer import SAETrainer

D_ACT, N_DICT, K = 16, 48, 8
BATCH_SIZE, N_POS = 32, 16
LOSS = LossConfig.model_validate({"out_to_in": {"coeff": 1.0}})
DIRECTIONS = torch.randn(N_DICT, D_ACT, generator=torch.Generator().manual_seed(0))


def sequences(seed: int, n_rows: int = BATCH_SIZE) -> Iterator[Tensor]:
    """Batches of activations that are sparse in fixed directions."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        shape = (n_rows, N_POS, N_DICT)
        code = torch.rand(shape, generator=generator) * (
            torch.rand(shape, generator=generator) < 0.1
        )
        yield code @ DIRECTIONS


HELD_OUT = next(sequences(1, n_rows=4096))
"""Activations that are not trained on."""


class Chain:
    """Two SAEs, of which the second reads what the first writes, less the first tokens."""

    def __init__(
        self, *, effective_batch_size: int = BATCH_SIZE, ignores_first: bool = True
    ) -> None:
        torch.manual_seed(0)
        self.saes: dict[str, SAE] = {
            "first": BatchTopKSAE(D_ACT, N_DICT, K),
            "second": MatryoshkaSAE(D_ACT, N_DICT, K, [16]),
        }
        self.ignores_first = ignores_first
        config = TrainingConfig(
            n_samples=10**6,
            batch_size=BATCH_SIZE,
            effective_batch_size=effective_batch_size,
            lr=4e-3,
            lr_schedule="constant",
        )
        self.trainer = SAETrainer(self.saes, self.forward, LOSS, config)

    def forward(self, batch: Tensor) -> Passes:
        torch.rand(())  # as a step that draws a prefix does
        first = self.saes["first"](batch)
        second = self.saes["second"](2 * first.output)
        passes = Passes({}, {"first": first, "second": second}, saes=self.saes)
        kept = torch.ones(batch.shape[:2], dtype=torch.bool)
        kept[:, 0] = not self.ignores_first
        return passes.only(kept)

    def train(self, batches: Iterator[Tensor], n: int) -> None:
        for batch in islice(batches, n):
            self.trainer.learn_from(self.trainer.batch_loss(batch), BATCH_SIZE)

    def l0s(self, rows: Tensor) -> list[float]:
        """Mean numbers of active elements in eval mode."""
        for sae in self.saes.values():
            sae.eval()
        with torch.no_grad():
            found = [acts.c for acts in self.forward(rows).sae_acts.values()]
        for sae in self.saes.values():
            sae.train()
        return [(c != 0).sum(dim=-1).float().mean().item() for c in found]

    def thresholds(self) -> list[float]:
        return [float(sae.get_buffer("threshold")) for sae in self.saes.values()]


@pytest.mark.slow
def test_eval_mode_has_k_active_elements_while_the_weights_move():
    chain, batches = Chain(effective_batch_size=2 * BATCH_SIZE), sequences(0)
    seen = []
    for n in (25, 75, 100):  # after 25, 100 and 200 batches
        chain.train(batches, n)
        chain.trainer.fit()
        # All 16 * 32 * 15 = 7,680 tokens are fitted to. The second SAE reads what the first writes
        # in eval mode, which differs a little from what it writes in training.
        kept = torch.cat(chain.trainer.recent.state_dict())
        assert chain.l0s(kept) == pytest.approx([K, K], rel=0.005)
        # A token has 8 +- 4.5 elements, so the mean of 7,680 is known to 4.5 / sqrt(7680) = 0.05,
        # or 0.6 %. On text that was not trained on it is 0.5 % lower, too.
        assert chain.l0s(HELD_OUT) == pytest.approx([K, K], rel=0.03)
        seen.append(chain.thresholds())
    first = chain.saes["first"]
    first.get_buffer("threshold").fill_(seen[0][0])
    assert chain.l0s(HELD_OUT)[0] < 0.9 * K  # the threshold had to move


def test_between_two_fits_it_is_roughly_k():
    chain, batches = Chain(), sequences(0)
    chain.train(batches, 25)
    assert chain.l0s(HELD_OUT) == pytest.approx([K, K], rel=0.15)


SHAPES = [(32, 1024), (64, 1024), (512, 512), (2, 16), (8, 300)]
"""Batches of few and of many long sequences."""


@pytest.mark.parametrize(("batch_size", "n_ctx"), SHAPES)
def test_each_place_of_a_sequence_has_its_share_of_the_rows(batch_size: int, n_ctx: int):
    n_batches = -(-N_SAMPLES // batch_size)
    n = -(-N_ROWS // n_batches)
    places = torch.arange(n_ctx).repeat(batch_size)[:, None]
    drawn = torch.cat([drawn_rows(places, n, seed) for seed in range(n_batches)]).flatten()
    assert len(drawn) == n_batches * min(n, len(places))
    counts = drawn.bincount(minlength=n_ctx).double()
    expected = len(drawn) / n_ctx
    # Counts of independent draws have the variance of their mean.
    assert abs(counts[0] - expected) <= 2 * expected**0.5
    assert (counts - expected).abs().max() <= 5 * expected**0.5


def test_rows_are_drawn_once_and_alike_each_time():
    rows = torch.arange(100.0)[:, None]
    torch.manual_seed(0)
    drawn = drawn_rows(rows, 30, 1)
    assert len(drawn.unique()) == 30
    torch.manual_seed(1)
    assert torch.equal(drawn_rows(rows, 30, 1), drawn)
    assert not torch.equal(drawn_rows(rows, 30, 2), drawn)
    assert torch.equal(drawn_rows(rows, 200, 1).sort(dim=0).values, rows)


@pytest.mark.slow
def test_long_sequences_whose_first_token_is_an_outlier_have_k_active_elements():
    torch.manual_seed(0)
    sae = BatchTopKSAE(D_ACT, N_DICT, K)
    recent = RecentBatches(
        {"sae": sae}, lambda batch: Passes({}, {"sae": sae(batch)}, saes={"sae": sae}), 64
    )
    batches = [torch.randn(64, 1024, D_ACT) for _ in range(8)]
    for batch in batches:
        batch[:, 0] *= 100
        recent.add(batch)
    recent.fit()
    sae.eval()
    l0s = [(sae(batch).c != 0).sum(dim=-1).float().mean().item() for batch in batches]
    assert sum(l0s) / len(l0s) == pytest.approx(K, rel=0.01)


def test_a_fit_changes_nothing_that_training_depends_on():
    fitted, other = Chain(), Chain()
    batches, same_batches = sequences(0), sequences(0)
    for _ in range(3):
        torch.manual_seed(3)
        fitted.train(batches, 2)
        fitted.trainer.fit()
        drawn = torch.rand(())
        torch.manual_seed(3)
        other.train(same_batches, 2)
        assert torch.rand(()) == drawn
    for name, sae in fitted.saes.items():
        for parameter, expected in zip(
            sae.parameters(), other.saes[name].parameters(), strict=True
        ):
            assert torch.equal(parameter, expected)
    other.trainer.fit()
    assert other.thresholds() == fitted.thresholds()


def test_a_resumed_run_fits_as_one_that_was_not_stopped():
    whole, batches = Chain(effective_batch_size=2 * BATCH_SIZE), sequences(0)
    whole.train(batches, 21)
    stopped = Chain(effective_batch_size=2 * BATCH_SIZE)
    for name, sae in whole.saes.items():
        stopped.saes[name].load_state_dict(copy.deepcopy(sae.state_dict()))
    state = copy.deepcopy((whole.trainer.state_dict(), whole.trainer.stepper.state_dict()))
    stopped.trainer.load_state_dict(state[0], 21 * BATCH_SIZE)
    stopped.trainer.stepper.load_state_dict(state[1])
    for chain, rest in ((whole, batches), (stopped, islice(sequences(0), 21, None))):
        chain.train(iter(rest), 8)
        chain.trainer.fit()
    assert stopped.thresholds() == whole.thresholds()


def test_so_many_samples_are_kept():
    recent = RecentBatches({"one": BatchTopKSAE(2, 4, 1)}, lambda _: Passes({}, {}), 100)
    for number in range(20):
        recent.add(number)
    assert recent.state_dict() == list(range(20 - -(-N_SAMPLES // 100), 20))


def test_nothing_is_kept_for_saes_that_fit_nothing():
    recent = RecentBatches({"one": TopKSAE(2, 4, 1)}, lambda _: Passes({}, {}), 100)
    recent.add(1)
    assert recent.state_dict() == []
    recent.fit()


def test_batches_in_which_no_token_counts_leave_the_threshold():
    chain = Chain()
    chain.trainer.recent.add(torch.randn(2, 1, D_ACT))
    chain.trainer.fit()
    assert chain.thresholds() == [-1.0, -1.0]
