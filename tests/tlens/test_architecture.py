from typing import Any

import pytest

from sparsify.tlens.architecture import Architecture

SIZES: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 12,
    "n_heads": 3,
    "d_mlp": 8,
    "n_ctx": 4,
    "d_vocab": 5,
}


def test_head_width_is_the_models_divided_by_the_heads():
    assert Architecture(**SIZES).d_head == 4  # 12 / 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 5}, r"n_heads \(5\) must divide d_model \(12\)"),
        ({"n_heads": 4}, "rotary positions need an even head width, not 3"),
        ({"n_layers": 0}, "greater than 0"),
        ({"act_fn": "tanh"}, "act_fn"),
        ({"n_head": 3}, "unknown key 'n_head'; did you mean 'n_heads'"),
    ],
)
def test_impossible_architecture_is_rejected(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Architecture.model_validate(SIZES | fields)


def test_odd_head_width_is_fine_without_rotation():
    sizes = SIZES | {"n_heads": 4, "positional_embedding_type": "standard"}
    assert Architecture.model_validate(sizes).d_head == 3  # 12 / 4
