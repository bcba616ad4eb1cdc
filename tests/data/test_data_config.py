from typing import Any

import pytest

from sparsify.data.config import DataConfig
from sparsify.settings.base_config import UserError, validate_config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_ctx": 0}, r"n_ctx: Input should be greater than 0 \(given: 0\)"),
        ({"n_epochs": 0}, "n_epochs: Input should be greater than 0"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"shuffle_block_samples": 0}, "shuffle_block_samples: Input should be greater than 0"),
        ({"dataset": "x"}, "unknown key 'dataset'; did you mean 'dataset_name'"),
        ({"is_tokenized": True, "add_bos_token": True}, "add_bos_token: true cannot be combined"),
        ({"n_ctx": 1, "add_bos_token": True}, "n_ctx: 1 has room for the BOS token only"),
        ({"dataset_name": "python-stdib"}, "'python-stdib' is unknown; did you mean 'python-stdli"),
        (
            {"dataset_name": "python-stdlib", "split": "test"},
            "split: python-stdlib has no split 'test'; use one of train, validation",
        ),
        (
            {"dataset_name": "python-stdlib", "is_tokenized": True},
            "is_tokenized: True: has no meaning for python-stdlib; remove it",
        ),
        (
            {"dataset_name": "python-stdlib", "column_name": "text", "streaming": False},
            "streaming: False, column_name: text: has no meaning for python-stdlib",
        ),
        ({"dataset_name": "python-stdlib", "subset": "a"}, "subset: a: has no meaning for python"),
    ],
)
def test_bad_data_config_is_rejected(fields: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        validate_config(DataConfig, {"dataset_name": "user/name", "n_ctx": 8, **fields}, "test")


def test_column_defaults_to_what_the_rows_hold():
    text = DataConfig(dataset_name="user/name", n_ctx=8)
    ids = DataConfig(dataset_name="user/name", n_ctx=8, is_tokenized=True)
    other = DataConfig(dataset_name="user/name", n_ctx=8, is_tokenized=True, column_name="tokens")
    assert (text.column, ids.column, other.column) == ("text", "input_ids", "tokens")
