import subprocess
import sys

import pytest

from sparsify.losses.loss import LossConfig

FIRST, SECOND, LATER = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


@pytest.mark.parametrize(
    ("fields", "needs_logits", "needs_spliced_pass", "raw", "spliced"),
    [
        ({"sparsity": {"coeff": 1}}, False, False, [], []),
        ({"out_to_in": {"coeff": 1}}, False, False, [], []),
        ({"out_to_orig": {"coeff": 1}}, False, True, [FIRST, SECOND], []),
        (
            {"in_to_orig": {"total_coeff": 1, "hook_positions": [SECOND, LATER]}},
            False,
            True,
            [SECOND, LATER],
            [LATER],
        ),
        ({"logits_kl": {"coeff": 1}}, True, True, [], []),
    ],
    ids=["sparsity", "out_to_in", "out_to_orig", "in_to_orig", "logits_kl"],
)
def test_each_term_says_what_it_needs(
    fields: dict[str, dict[str, object]],
    needs_logits: bool,
    needs_spliced_pass: bool,
    raw: list[str],
    spliced: list[str],
):
    ((_, term),) = LossConfig.model_validate(fields).terms().items()
    assert (term.needs_logits, term.needs_spliced_pass) == (needs_logits, needs_spliced_pass)
    assert term.raw_positions([FIRST, SECOND]) == raw
    assert term.spliced_positions([FIRST, SECOND]) == spliced


def test_the_loss_section_of_an_original_config_loads_and_survives_a_round_trip():
    fields = {
        "sparsity": {"p_norm": 1.0, "coeff": 3.0},
        "in_to_orig": {"hook_positions": [SECOND, LATER], "total_coeff": 2.5},
        "out_to_orig": None,
        "out_to_in": None,
        "logits_kl": {"coeff": 0.5},
    }
    losses = LossConfig.model_validate(fields)
    assert list(losses.terms()) == ["sparsity", "in_to_orig", "logits_kl"]
    assert LossConfig.model_validate(losses.model_dump(mode="json")) == losses


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no term, so there is nothing to train; set one of sparsity, in_to_orig"),
        ({"sparsity": None, "logits_kl": None}, "has no term"),
        ({"sparsity": {"coeff": 0}, "logits_kl": {"coeff": 0}}, "every coefficient is 0"),
        ({"sparsity": {"coeff": -1}}, "sparsity.coeff\n  .*greater than or equal to 0"),
        ({"sparsity": {"coeff": float("inf")}}, "sparsity.coeff\n  .*finite"),
        ({"sparsity": {"coeff": 1, "p_norm": 0}}, "sparsity.p_norm\n  .*greater than 0"),
        ({"sparsity": {}}, "sparsity.coeff\n  Field required"),
        ({"logit_kl": {"coeff": 1}}, "'logit_kl'; did you mean 'logits_kl'"),
        ({"in_to_orig": {"total_coeff": 1, "hook_positions": []}}, "names no hook point"),
        (
            {"in_to_orig": {"total_coeff": 1, "hook_positions": [SECOND, LATER, SECOND]}},
            rf"hook_positions\n.*'{SECOND}' is repeated; name it once",
        ),
    ],
)
def test_bad_loss_is_rejected(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        LossConfig.model_validate(fields)


def test_configs_load_without_torch():
    code = (
        "import sys, sparsify.losses.loss, sparsify.saes.config; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
