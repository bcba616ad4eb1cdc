import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsify.settings.base_config import UserError
from sparsify.tlens.architecture import Architecture
from sparsify.tlens.native_model import (
    CONFIG_FILE,
    MODEL_FILE,
    TrainableModel,
    bridge_config,
    hooked_transformer_weights,
    load_native_model,
    save_language_model,
)

pytestmark = pytest.mark.model

SIZES = {"n_layers": 2, "d_model": 12, "n_heads": 3, "d_mlp": 20, "n_ctx": 8, "d_vocab": 30}
KINDS = [(norm, pos) for norm in ("LN", "RMS") for pos in ("rotary", "standard")]


def build(norm: str = "LN", positions: str = "rotary") -> TrainableModel:
    fields = {"normalization_type": norm, "positional_embedding_type": positions}
    model = TrainableModel(Architecture.model_validate(SIZES | fields), seed=0)
    with torch.no_grad():  # biases begin at 0 and norms at 1, where mistakes do not show
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(30, (2, 8))


@pytest.mark.parametrize(("norm", "positions"), KINDS)
def test_fused_attention_gives_the_logits_of_transformerlens(
    norm: str, positions: str, tokens: Tensor, tmp_path: Path
):
    model = build(norm, positions)
    save_language_model(tmp_path, model, torch.float32)
    architecture, native = load_native_model(tmp_path)
    assert architecture == model.architecture
    torch.testing.assert_close(model(tokens), native(tokens), rtol=1e-5, atol=1e-5)


def test_logits_are_the_unembedded_final_residual(tokens: Tensor):
    model = build()
    torch.testing.assert_close(model(tokens), model.unembed(model.final_residual(tokens)))
    # Later tokens do not change earlier logits.
    torch.testing.assert_close(model(tokens[:, :3]), model(tokens)[:, :3])


def test_every_parameter_is_trained(tokens: Tensor):
    model = build(positions="standard")
    model(tokens).log_softmax(dim=-1)[..., 0].sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_seed_decides_the_weights():
    architecture = Architecture.model_validate(SIZES)
    first, same, other = (TrainableModel(architecture, seed).state_dict() for seed in (0, 0, 1))
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert not torch.equal(first["native.head.weight"], other["native.head.weight"])


@pytest.mark.parametrize(("norm", "positions"), KINDS)
def test_half_precision_loses_no_more_than_rounding(
    norm: str, positions: str, tokens: Tensor, tmp_path: Path
):
    model = build(norm, positions)
    save_language_model(tmp_path, model, torch.float16)
    _, native = load_native_model(tmp_path)
    assert {tensor.dtype for tensor in native.state_dict().values()} == {torch.float32}
    rounded = {name: tensor.half().float() for name, tensor in model.native.state_dict().items()}
    torch.testing.assert_close(dict(native.state_dict()), rounded, rtol=0, atol=0)
    # The rotary tables are no weights, and are not rounded.
    model.native.load_state_dict(rounded)
    torch.testing.assert_close(native(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_bridge_config_has_the_architectures_terms():
    architecture = Architecture.model_validate(SIZES | {"act_fn": "silu", "eps": 1e-3})
    cfg = bridge_config(architecture)
    for name, value in architecture.model_dump().items():
        assert getattr(cfg, name) == value
    assert (cfg.d_head, cfg.rotary_dim) == (4, 4)  # 12 / 3
    assert isinstance(TrainableModel(architecture, seed=0), nn.Module)


def test_hooked_transformer_weights_are_shaped_by_head():
    model = build(positions="standard")
    weights = hooked_transformer_weights(model.native)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes["embed.W_E"] == (30, 12)
    assert shapes["pos_embed.W_pos"] == (8, 12)
    assert shapes["blocks.1.attn.W_Q"] == (3, 12, 4)
    assert shapes["blocks.1.attn.b_Q"] == (3, 4)
    assert shapes["blocks.1.attn.W_O"] == (3, 4, 12)
    assert shapes["blocks.1.mlp.W_in"] == (12, 20)
    assert shapes["unembed.W_U"] == (12, 30)
    # Head 1 reads rows 4 to 7 of the linear map.
    query = model.native.layers[1].attn.q.weight
    assert torch.equal(weights["blocks.1.attn.W_Q"][1], query[4:8].T)


# Damage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_language_model(tmp_path, build(), torch.float16)
    return tmp_path


@pytest.mark.parametrize("file", [CONFIG_FILE, MODEL_FILE])
def test_missing_file_is_named(folder: Path, file: str):
    (folder / file).unlink()
    with pytest.raises(UserError, match=rf"^tlens_model_path: .* has no {file}; give the model/"):
        load_native_model(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [(CONFIG_FILE, b'{"n_layers": 2'), (CONFIG_FILE, b"\xff"), (MODEL_FILE, b"torn")],
)
def test_damaged_file_is_reported(folder: Path, file: str, content: bytes):
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=r"^tlens_model_path: .* is damaged .*; copy it again"):
        load_native_model(folder)


def test_torn_weights_are_reported(folder: Path):
    whole = (folder / MODEL_FILE).read_bytes()
    (folder / MODEL_FILE).write_bytes(whole[:-100])
    with pytest.raises(UserError, match="is damaged"):
        load_native_model(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 2}, "unknown key 'n_layer'; did you mean 'n_layers'"),
        ({"d_vocab": 31}, "weights and config.json of .* do not belong together"),
        ({"n_layers": 3}, "do not belong together"),
        ({"normalization_type": "RMS"}, "do not belong together"),
    ],
)
def test_config_that_does_not_fit_is_reported(
    folder: Path, fields: dict[str, object], message: str
):
    content = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(content | fields))
    with pytest.raises(UserError, match=message):
        load_native_model(folder)


def test_config_that_is_no_mapping_is_reported(folder: Path):
    (folder / CONFIG_FILE).write_text("[]")
    with pytest.raises(UserError, match="is not a valid config"):
        load_native_model(folder)
