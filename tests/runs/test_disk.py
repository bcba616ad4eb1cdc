import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import nn

from sparsify.runs.disk import check_disk, check_disk_at_start, estimate_disk
from sparsify.settings.base_config import UserError
from sparsify.training.config import TrainingConfig


class DiskSpace(NamedTuple):
    total: int
    used: int
    free: int


def config_of(**settings: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"n_samples": 64, "batch_size": 4, "lr": 1.0, **settings})


@pytest.mark.parametrize(
    ("settings", "n_samples_done", "first", "whole"),
    [
        # A layer of 6 floats takes 24 bytes, and the two tensors of an optimizer twice that.
        ({}, 0, 24 + 48, 24 + 48),
        # 64 samples, saved at 16, 32, 48 and 64; two states are kept while a third is written.
        ({"save_every_n_samples": 16}, 0, 24 + 48, 4 * 24 + 3 * 48),
        ({"save_every_n_samples": 16, "keep_last": 1}, 32, 24 + 48, 2 * 24 + 2 * 48),
        # The last one, at 64, is not a multiple of 48.
        ({"save_every_n_samples": 48, "effective_batch_size": 8}, 0, 24 + 72, 2 * 24 + 2 * 72),
    ],
)
def test_disk_is_that_of_all_weights_and_the_last_states(
    settings: dict[str, Any], n_samples_done: int, first: int, whole: int
):
    layer = nn.Linear(2, 2)
    use = estimate_disk(config_of(**settings), layer, layer.parameters(), n_samples_done)
    assert (use.first, use.whole) == (first, whole)


def test_a_full_disk_is_refused_and_one_that_will_be_full_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    layer = nn.Linear(1000, 1000)  # 4 MB, and 8 MB for the optimizer
    weights = list(layer.parameters())
    config = config_of(save_dir=tmp_path / "a" / "b", save_every_n_samples=16)

    def leave(free_mb: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskSpace(0, 0, free_mb * 10**6))

    leave(100)
    check_disk_at_start(config, layer, weights)
    assert check_disk(config, layer, weights, 0) == "4 checkpoints of 40 MB in all; 100 MB free"
    leave(20)
    check_disk_at_start(config, layer, weights)
    warning = (
        "save_dir: checkpoints of the run would take about 40 MB, but the disk of "
        f"'{config.save_dir}' has 20 MB free; make room, choose another save_dir, or raise "
        "save_every_n_samples"
    )
    assert capsys.readouterr().err == f"warning: {warning}\n"
    with pytest.raises(UserError) as caught:
        check_disk(config, layer, weights, 0)
    assert str(caught.value) == warning
    leave(2)
    with pytest.raises(
        UserError, match="the next checkpoint of the run would take about 12 MB, but"
    ):
        check_disk_at_start(config, layer, weights)
    check_disk_at_start(config_of(save_dir=None), layer, weights)
