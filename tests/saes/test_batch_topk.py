from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.saes.acts import SAEActs
from sparsify.saes.batch_topk import BatchTopKSAE, are_largest
from sparsify.saes.build import build_sae
from sparsify.saes.config import BatchTopKSAEConfig


def tiny_sae() -> BatchTopKSAE:
    """Three elements on activations of width two, with round numbers, one active on average."""
    sae = build_sae(BatchTopKSAEConfig(dict_size_to_input_ratio=1.5, k=1), d_act=2)
    assert isinstance(sae, BatchTopKSAE)
    sae.load_state_dict(
        {
            "encoder.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
            "encoder.bias": torch.tensor([0.0, 0.0, -4.0]),
            "decoder.weight": torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.8, 1.0]]),
            "decoder.bias": torch.tensor([1.0, 2.0]),
            "threshold": torch.tensor(-1.0),
        }
    )
    return sae


def test_code_and_output_match_hand_computation():
    # Centred inputs (2, 5) and (1, 0.5), pre-activations (2, 5, 3) and (1, 0.5, -2.5). Of all six
    # the 1 * 2 largest are 5 and 3: the first token has both, the second none. The outputs are
    # 5 (0.6, 0.8) + 3 (0, 1) + (1, 2) = (4, 9) and (1, 2).
    acts = tiny_sae()(torch.tensor([[3.0, 7.0], [2.0, 2.5]]))
    torch.testing.assert_close(acts.c, torch.tensor([[0.0, 5.0, 3.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(acts.output, torch.tensor([[4.0, 9.0], [1.0, 2.0]]))


def learn(sae: BatchTopKSAE, pre_acts: Tensor) -> Tensor:
    """The code of a training batch, from which the SAE learns its threshold."""
    c = sae.activate(pre_acts)
    rows = torch.zeros(len(c), sae.d_act)
    sae.learn_from(SAEActs(input=rows, c=c, output=rows))
    return c


def test_the_threshold_is_the_smallest_entry_kept_in_the_last_batch():
    sae = tiny_sae()
    learn(sae, torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.5, 0.0]]))  # keeps 3 and 2
    assert sae.threshold.item() == 2.0
    learn(sae, torch.tensor([[5.0, 4.0, 3.0], [1.0, 0.0, 0.0]]))  # keeps 5 and 4
    assert sae.threshold.item() == 4.0
    learn(sae, torch.tensor([[7.0, -4.0, -3.0], [-1.0, -2.0, 0.0]]))  # 7 alone is positive
    assert sae.threshold.item() == 7.0


def test_a_fit_keeps_as_many_entries_as_training():
    sae = tiny_sae()
    # Centred inputs (2, 5), (1, 0.5) and (4, 1), pre-activations (2, 5, 3), (1, 0.5, -2.5) and
    # (4, 1, 1). The 1 * 3 largest are 5, 4 and 3, and the largest that is not active is 2.
    inputs = torch.tensor([[3.0, 7.0], [2.0, 2.5], [5.0, 3.0]])
    sae.fit(inputs)
    assert sae.threshold.item() == 2.0
    assert torch.equal(sae.eval().encode(inputs) > 0, sae.train().encode(inputs) > 0)


def test_a_fit_in_parts_is_that_of_all_entries(monkeypatch: pytest.MonkeyPatch):
    sae, inputs = BatchTopKSAE(d_act=8, n_dict=32, k=3), torch.randn(50, 8)
    monkeypatch.setattr("sparsify.saes.batch_topk.FIT_ROWS", 7)
    sae.fit(inputs)
    entries = sae.affine(inputs - sae.decoder.bias).flatten().sort(descending=True).values
    assert sae.threshold == entries[3 * 50]
    assert sae.eval().encode(inputs).count_nonzero() == 3 * 50


@pytest.mark.parametrize("k", [9, 12])
def test_a_fit_to_too_few_positive_entries_keeps_these(k: int):
    sae, inputs = BatchTopKSAE(d_act=4, n_dict=12, k=k), torch.randn(20, 4)
    sae.fit(inputs)
    assert sae.threshold == 0.0
    pre_acts = sae.affine(inputs - sae.decoder.bias)
    assert torch.equal(sae.eval().encode(inputs) > 0, pre_acts > 0)


def test_a_fit_to_nothing_changes_nothing():
    sae = tiny_sae()
    sae.fit(torch.empty(0, 2))
    assert sae.threshold.item() == -1.0


@pytest.mark.parametrize("n_batches", [0, 1])
def test_a_batch_without_positive_entries_leaves_the_threshold(n_batches: int):
    sae = tiny_sae()
    for _ in range(n_batches):
        learn(sae, torch.tensor([[3.0, 1.0, 0.0]]))
    before = sae.threshold.item()
    assert not learn(sae, torch.tensor([[-3.0, -1.0, 0.0]])).any()
    assert sae.threshold.item() == before


def test_in_eval_mode_entries_above_the_threshold_are_kept():
    sae = tiny_sae()
    learn(sae, torch.tensor([[3.0, 2.0, 1.0], [1.0, 0.0, 0.0]]))
    c = sae.eval().activate(torch.tensor([[2.1, 2.0, 9.0], [1.9, -3.0, 0.0]]))
    torch.testing.assert_close(c, torch.tensor([[2.1, 0.0, 9.0], [0.0, 0.0, 0.0]]))
    assert sae.threshold.item() == 2.0


def test_before_anything_is_learned_eval_mode_keeps_positive_entries():
    pre_acts = torch.tensor([[0.1, -0.5, 2.0]])
    torch.testing.assert_close(tiny_sae().eval().activate(pre_acts), pre_acts.relu())


def test_a_token_does_not_depend_on_others_in_eval_mode_alone():
    sae = BatchTopKSAE(d_act=8, n_dict=32, k=4)
    x = torch.randn(20, 8)
    x[1:] *= torch.linspace(0.1, 9.0, 19)[:, None]
    sae.learn_from(sae(x))
    assert not torch.equal(sae.encode(x)[0] > 0, sae.encode(x[:1])[0] > 0)
    sae.eval()
    c = sae(x).c
    assert (c > 0).any(dim=-1).sum() > 10
    alone = torch.cat([sae(x[i : i + 1]).c for i in range(20)])
    torch.testing.assert_close(c, alone)
    pre_acts = sae.affine(x - sae.decoder.bias)
    torch.testing.assert_close(c, pre_acts.where(pre_acts > sae.threshold, 0.0))


def test_the_threshold_is_saved_and_loaded(tmp_path: Path):
    sae, x = BatchTopKSAE(d_act=4, n_dict=12, k=2), torch.randn(6, 4)
    sae.learn_from(sae(x))
    assert sae.threshold > 0
    save_file(sae.state_dict(), tmp_path / "sae.safetensors")
    loaded = BatchTopKSAE(d_act=4, n_dict=12, k=2)
    loaded.load_state_dict(load_file(tmp_path / "sae.safetensors"))
    assert torch.equal(loaded.threshold, sae.threshold)
    torch.testing.assert_close(loaded.eval()(x).output, sae.eval()(x).output, rtol=0, atol=0)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_a_batch_has_k_entries_per_token(k: int):
    pre_acts = torch.rand(2, 5, 9) + 0.1
    c = BatchTopKSAE(4, 9, k).activate(pre_acts)
    assert c.count_nonzero() == k * 2 * 5
    smallest_kept = pre_acts.flatten().sort(descending=True).values[k * 10 - 1]
    torch.testing.assert_close(c, pre_acts.where(pre_acts >= smallest_kept, 0.0), rtol=0, atol=0)


def test_among_equal_entries_the_first_are_kept():
    values = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 2.0]])
    expected = torch.tensor([[False, True, True], [True, False, False]])
    assert torch.equal(are_largest(values, 3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 20])
def test_n_entries_are_kept_of_equal_rows(dtype: torch.dtype, n: int):
    values = torch.tensor([3.0, -1.0, 2.0, 0.0], dtype=dtype).expand(5, 4)
    is_kept = are_largest(values, n)
    assert is_kept.count_nonzero() == n
    if n < 20:
        assert values[is_kept].min() >= values[~is_kept].max()


def test_equal_tokens_share_k_entries_per_token():
    sae = BatchTopKSAE(d_act=4, n_dict=12, k=2)
    x = torch.randn(4).expand(7, 4)
    assert sae(x).c.count_nonzero() == 2 * 7


def test_entries_left_out_have_no_gradient():
    pre_acts = torch.tensor([[3.0, 1.0, 2.0], [-1.0, 0.5, 0.2]], requires_grad=True)
    weights = torch.tensor([[5.0, 6.0, 7.0], [8.0, 9.0, 1.0]])
    (tiny_sae().activate(pre_acts) * weights).sum().backward()
    torch.testing.assert_close(pre_acts.grad, torch.tensor([[5.0, 0.0, 7.0], [0.0, 0.0, 0.0]]))
