import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsify.settings.base_config import UserError
from sparsify.training.finite import check_gradient, check_loss, check_weights

pytestmark = pytest.mark.fault

TERMS = {"sparsity/a": torch.tensor(1.0), "logits_kl": torch.tensor(float("nan"))}
TOKENS = torch.arange(6).reshape(2, 3)


@pytest.mark.parametrize(
    ("is_watched", "blame"),
    [(True, "has not been trained on"), (False, "or one since the last log line, is why")],
)
def test_the_term_and_the_batch_are_named(is_watched: bool, blame: str, tmp_path: Path):
    loss = torch.tensor(float("nan"))
    with pytest.raises(UserError) as caught:
        check_loss(loss, TERMS, TOKENS, 40, tmp_path, is_watched=is_watched)
    path = tmp_path / "bad_batch_40.safetensors"
    assert str(caught.value) == (
        f"loss/train/logits_kl is nan after 40 samples. The batch, whose tokens are in {path}, "
        f"{blame}; set max_grad_norm and go on from a checkpoint, or start anew with a lower lr"
    )
    torch.testing.assert_close(load_file(path), {"tokens": TOKENS})


def test_without_a_folder_no_batch_is_written():
    loss = torch.tensor(float("inf"))
    with pytest.raises(UserError, match=r"^loss is inf after 40 samples. The batch has not been"):
        check_loss(loss, {"sparsity/a": torch.tensor(1.0)}, TOKENS, 40, None, is_watched=True)


def test_finite_numbers_pass(tmp_path: Path):
    one = torch.tensor(1.0)
    check_loss(one, {"sparsity/a": one}, TOKENS, 40, tmp_path, is_watched=True)
    check_gradient(one, 40)
    check_weights([one, TOKENS.float()], 40)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_and_weights_that_are_not_finite_are_refused(value: float):
    with pytest.raises(UserError, match=r"^grad_norm is (nan|inf) after 40 samples, before the"):
        check_gradient(torch.tensor(value), 40)
    with pytest.raises(
        UserError, match=r"^weights or gradients are no longer finite after 40 samples and are"
    ):
        check_weights([torch.ones(2), torch.tensor([1.0, value])], 40)


def test_gradients_of_half_a_step_are_looked_at():
    gradient = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.tensor([[math.inf]]), (3, 1), check_invariants=True
    )
    with pytest.raises(UserError, match=r"^weights or gradients are no longer finite after 8 samp"):
        check_weights([torch.ones(2), gradient], 8)
