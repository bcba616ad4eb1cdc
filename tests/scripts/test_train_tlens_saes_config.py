from pathlib import Path
from typing import Any

import pytest

from sparsify.scripts.train_tlens_saes.config import Config, short_name

DATA = {"dataset_name": "python-stdlib", "n_ctx": 16}
SETTINGS: dict[str, Any] = {
    "n_samples": 8,
    "batch_size": 4,
    "lr": 1e-3,
    "loss": {"sparsity": {"coeff": 0.5}, "logits_kl": {"coeff": 1.0}},
    "saes": {"sae_positions": ["blocks.1.hook_resid_pre"], "dict_size_to_input_ratio": 2.0},
    "train_data": DATA,
    "eval_data": DATA,
}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/long/path/out/train_tlens/tlens_2026-11-28_10-22-33/model", "tlens"),
        ("out/my_model_2026-11-28_10-22-33_1/model/", "my_model"),
        ("models/gpt2-small", "gpt2-small"),
        ("model", "model"),
        (".", "model"),
    ],
)
def test_model_of_a_path_has_a_short_name(path: str, name: str):
    assert short_name(Path(path)) == name


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (
            {"tlens_model_path": f"/{'a' * 200}/tlens_2026-11-28_10-22-33/model"},
            "tlens-e2e-ratio-2-lr-0.001-sparsity-0.5",
        ),
        ({"tlens_model_name": "a/b"}, "a-b-e2e-ratio-2-lr-0.001-sparsity-0.5"),
    ],
)
def test_default_run_name_has_the_settings_that_matter(model: dict[str, str], name: str):
    assert Config.model_validate({**SETTINGS, **model}).run_name == name
