from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsify.runs.bad_batch import check_loss
from sparsify.settings.base_config import UserError
from sparsify.training.batch_loss import BatchLoss

pytestmark = pytest.mark.fault

TERMS = {"sparsity/a": torch.tensor(1.0), "logits_kl": torch.tensor(float("nan"))}
BATCH = {"tokens": torch.arange(6).reshape(2, 3)}


@pytest.mark.parametrize(
    ("is_watched", "blame"),
    [(True, "has not been trained on"), (False, "or one since the last log line, is why")],
)
def test_the_term_and_the_batch_are_named(is_watched: bool, blame: str, tmp_path: Path):
    loss = BatchLoss(torch.tensor(float("nan")), TERMS)
    with pytest.raises(UserError) as caught:
        check_loss(loss, BATCH, 40, tmp_path, is_watched=is_watched)
    path = tmp_path / "bad_batch_40.safetensors"
    assert str(caught.value) == (
        f"loss/train/logits_kl is nan after 40 samples. The batch, whose tokens are in {path}, "
        f"{blame}; set max_grad_norm and resume from a checkpoint, or start again with a lower lr"
    )
    torch.testing.assert_close(load_file(path), BATCH)


def test_without_a_folder_no_batch_is_written():
    loss = BatchLoss(torch.tensor(float("inf")), {"sparsity/a": torch.tensor(1.0)})
    with pytest.raises(UserError, match=r"^loss is inf after 40 samples. The batch has not been"):
        check_loss(loss, BATCH, 40, None, is_watched=True)


def test_a_finite_loss_passes(tmp_path: Path):
    one = torch.tensor(1.0)
    loss = BatchLoss(one, {"sparsity/a": one})
    check_loss(loss, BATCH, 40, tmp_path, is_watched=True)
    assert list(tmp_path.iterdir()) == []
