import pytest

from sparsify.losses.loss import LossConfig, check_loss_suits_kind, why_dense
from sparsify.losses.terms import CoeffSchedule
from sparsify.saes.config import KINDS, CodebookSAEConfig, ReLUSAEConfig, SAEConfig, TopKSAEConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": {"coeff": 1, "scale": 2}}, r"scale \(2.0\) belongs to penalty tanh and log"),
        (
            {"sparsity": {"coeff": 1, "penalty": "tanh", "p_norm": 0.5}},
            r"p_norm \(0.5\) belongs to penalty p_norm, not to 'tanh'; remove it",
        ),
        (
            {"sparsity": {"coeff": 0, "target_l0": 9}, "out_to_in": {"coeff": 1}},
            r"coeff \(0\) is where the controller of target_l0 starts",
        ),
        (
            {"logits_kl": {"coeff": 0.5, "balance_with": "out_to_in"}},
            "logits_kl.balance_with: out_to_in is null; set it",
        ),
        ({"out_to_in": {"coeff": 1, "schedule": {}}}, "changes nothing; set warmup_samples"),
    ],
)
def test_bad_term_is_rejected(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        LossConfig.model_validate(fields)


RELU = ReLUSAEConfig(dict_size_to_input_ratio=2)
TOPK = TopKSAEConfig(dict_size_to_input_ratio=2, k=1)
CODEBOOK = CodebookSAEConfig(dict_size_to_input_ratio=2, k=1)


@pytest.mark.parametrize(
    ("fields", "sae", "message"),
    [
        ({"sparsity": {"coeff": 1}}, CODEBOOK, "kind 'codebook' have nothing to penalise"),
        ({"aux_k": {"coeff": 1}}, CODEBOOK, "kind 'codebook' have no pre-activations"),
        (
            {"sparsity": {"coeff": 1, "target_l0": 9}},
            TOPK,
            r"target_l0 \(9\): saes.k \(1\) decides",
        ),
        ({"sparsity": {"coeff": 1, "penalty": "l0"}}, RELU, r"\(l0\) has no gradient in SAEs of k"),
        ({"pre_act": {"coeff": 1}}, RELU, "belongs to kind jumprelu, not to 'relu'"),
    ],
)
def test_a_term_without_meaning_for_the_kind_is_rejected(
    fields: dict[str, object], sae: SAEConfig, message: str
):
    losses = LossConfig.model_validate(fields)
    with pytest.raises(ValueError, match=message):
        check_loss_suits_kind(losses, sae)


def test_coefficient_schedule_by_hand():
    schedule = CoeffSchedule(warmup_samples=10, end_factor=0.2)
    factors = [schedule.factor(n_done, 110) for n_done in (0, 5, 10, 60, 110, 200)]
    assert factors == pytest.approx([0, 0.5, 1, 1 - 0.8 / 2, 0.2, 0.2])


@pytest.mark.parametrize("kind", ["relu", "relu_tied_bias", "gated", "jumprelu", "transcoder"])
def test_a_kind_that_nothing_makes_sparse_is_said_to_be_dense(kind: str):
    settings = {"bandwidth": 0.1, "initial_threshold": 0.1} if kind == "jumprelu" else {}
    sae = KINDS[kind].model_validate({"dict_size_to_input_ratio": 2.0, **settings})
    error = {"out_to_in": {"coeff": 1.0}}
    for sparsity, setting in ((None, "loss.sparsity is null"), (0.0, "loss.sparsity.coeff is 0")):
        term = {} if sparsity is None else {"sparsity": {"coeff": sparsity}}
        reason = why_dense(LossConfig.model_validate({**error, **term}), sae)
        assert reason is not None
        assert reason.startswith(f"{setting}, so nothing makes SAEs of kind '{kind}' sparse; set ")
    sparse = LossConfig.model_validate({**error, "sparsity": {"coeff": 0.1, "target_l0": 5.0}})
    assert why_dense(sparse, sae) is None


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "matryoshka", "codebook", "transcoder"])
def test_a_kind_with_k_needs_no_sparsity(kind: str):
    sae = KINDS[kind].model_validate({"dict_size_to_input_ratio": 2.0, "k": 3})
    assert why_dense(LossConfig.model_validate({"out_to_in": {"coeff": 1.0}}), sae) is None
