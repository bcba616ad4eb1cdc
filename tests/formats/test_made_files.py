"""Files made by hand, as their formats say, compute what the formats' formulas say.

Gemma Scope, OpenAI and Neel Nanda have no package that can be installed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsify.formats import WRITERS, load
from sparsify.formats.loaded import LoadedSAE

D, F = 6, 10


def weights(*, transposed: bool = False) -> dict[str, Tensor]:
    """Encoder `F D`, decoder `D F` and biases at random; transposed: as `x @ W` has them."""
    torch.manual_seed(0)
    encoder, decoder = torch.randn(F, D), torch.randn(D, F)
    found = {
        "encoder": encoder,
        "decoder": decoder,
        "b_enc": torch.randn(F),
        "b_dec": torch.randn(D),
    }
    if transposed:
        found |= {"encoder": encoder.T.contiguous(), "decoder": decoder.T.contiguous()}
    return found


def inputs() -> Tensor:
    torch.manual_seed(1)
    return 1 + 2 * torch.randn(4, 9, D)


def only(source: Path) -> LoadedSAE:
    (loaded,) = load(source).entries.values()
    return loaded


def assert_computes(loaded: LoadedSAE, c: Tensor, output: Tensor) -> None:
    x = inputs()
    sae = loaded.sae.eval()
    with torch.no_grad():
        acts = sae(x)
    torch.testing.assert_close(acts.c, c, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(acts.output, output, atol=1e-5, rtol=1e-5)
    assert 0.05 < (c != 0).float().mean() < 0.95


def openai_file(folder: Path, **more: Any) -> Path:
    w = weights()
    path = folder / "resid_post_mlp_v5_32k" / "autoencoders" / "8.pt"
    path.parent.mkdir(parents=True)
    state = {
        "pre_bias": w["b_dec"],
        "encoder.weight": w["encoder"],
        "latent_bias": w["b_enc"],
        "decoder.weight": w["decoder"],
        "stats_last_nonzero": torch.zeros(F, dtype=torch.int64),
        "latents_activation_frequency": torch.zeros(F),
        "latents_mean_square": torch.zeros(F),
    }
    torch.save({**state, **more}, path)
    return path


def test_a_file_of_openai_with_a_relu(tmp_path: Path):
    loaded, w, x = only(openai_file(tmp_path)), weights(), inputs()
    c = ((x - w["b_dec"]) @ w["encoder"].T + w["b_enc"]).relu()
    assert_computes(loaded, c, c @ w["decoder"].T + w["b_dec"])
    assert (loaded.position, loaded.config.kind) == ("blocks.8.hook_resid_post", "relu_tied_bias")


@pytest.mark.parametrize(
    "more",
    [
        {"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "ReLU"}},
        {"activation": "TopK", "activation.k": 3, "activation.postact_fn": "ReLU"},
    ],
)
def test_a_file_of_openai_with_topk_has_a_layer_norm(more: dict[str, Any], tmp_path: Path):
    loaded, w, x = only(openai_file(tmp_path, **more)), weights(), inputs()
    mean, std = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
    z = ((x - mean) / (std + 1e-5) - w["b_dec"]) @ w["encoder"].T + w["b_enc"]
    values, index = z.topk(3, dim=-1)
    c = torch.zeros_like(z).scatter(-1, index, values.relu())
    assert_computes(loaded, c, (c @ w["decoder"].T + w["b_dec"]) * std + mean)
    assert loaded.config.kind == "topk"


@pytest.mark.parametrize("dialect", ["published", "newer"])
def test_files_of_neel_nanda(dialect: str, tmp_path: Path):
    w, x = weights(transposed=True), inputs()
    names = {"W_enc": "encoder", "W_dec": "decoder", "b_enc": "b_enc", "b_dec": "b_dec"}
    torch.save({theirs: w[ours] for theirs, ours in names.items()}, tmp_path / "25.pt")
    config: dict[str, Any] = {"d_mlp": D, "dict_mult": F / D, "seq_len": 128, "enc_dtype": "fp32"}
    if dialect == "newer":
        config = {"act_size": D, "dict_size": F, "act_name": "blocks.1.hook_resid_pre"}
    (tmp_path / "25_cfg.json").write_text(json.dumps(config))
    c = ((x - w["b_dec"]) @ w["encoder"] + w["b_enc"]).relu()
    for source in (tmp_path, tmp_path / "25.pt"):
        loaded = only(source)
        assert_computes(loaded, c, c @ w["decoder"] + w["b_dec"])
    expected = {"published": "blocks.0.mlp.hook_post", "newer": "blocks.1.hook_resid_pre"}
    assert loaded.position == expected[dialect]
    WRITERS["neel_nanda"].write(loaded, tmp_path / "again")
    again = only(tmp_path / "again")
    assert (again.position, again.config) == (loaded.position, loaded.config)
    state = loaded.sae.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in again.sae.state_dict().items())


def gemma_weights(**more: Tensor) -> dict[str, Tensor]:
    w = weights(transposed=True)
    return {
        "W_enc": w["encoder"],
        "W_dec": w["decoder"],
        "b_enc": w["b_enc"],
        "b_dec": w["b_dec"],
        "threshold": torch.linspace(0, 2, F),
        **more,
    }


def gemma_values(x: Tensor) -> tuple[Tensor, Tensor]:
    w = gemma_weights()
    z = x @ w["W_enc"] + w["b_enc"]
    c = z.relu() * (z > w["threshold"])
    return c, c @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize(
    ("release", "position"),
    [
        ("gemma-scope-2b-pt-res", "blocks.20.hook_resid_post"),
        ("gemma-scope-9b-it-mlp", "blocks.20.hook_mlp_out"),
        ("gemma-scope-2b-pt-att", "blocks.20.attn.hook_z"),
        ("gemma-scope-2b-pt-transcoders", "blocks.20.hook_mlp_out"),
    ],
)
@pytest.mark.parametrize("small", [False, True])
def test_files_of_gemma_scope_1(release: str, position: str, small: bool, tmp_path: Path):
    folder = tmp_path / release / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    arrays: dict[str, Any] = {
        name.replace("W_", "w_") if small else name: tensor.numpy()
        for name, tensor in gemma_weights().items()
    }
    np.savez(folder / "params.npz", **arrays)
    loaded = only(folder)
    assert_computes(loaded, *gemma_values(inputs()))
    assert loaded.position == position
    assert (loaded.read_position != position) == release.endswith("transcoders")
    assert loaded.origin.stored_metrics == {"l0": 71.0}
    wanted = {"2b-pt": "google/gemma-2-2b", "9b-it": "google/gemma-2-9b-it"}
    assert loaded.origin.model_name == wanted[release.split("scope-")[1][:5]]


def test_an_embedding_of_gemma_scope_is_in_the_scale_of_the_model(tmp_path: Path):
    # TransformerLens multiplies embeddings by sqrt(width) before the hook point.
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    folder.mkdir(parents=True)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in gemma_weights().items()}
    np.savez(folder / "params.npz", **arrays)
    c, output = gemma_values(inputs() / D**0.5)
    loaded = only(folder)
    with torch.no_grad():
        acts = loaded.sae(inputs())
    torch.testing.assert_close(acts.c, c, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(acts.output, output * D**0.5, atol=1e-5, rtol=1e-5)
    assert loaded.position == "hook_embed"


@pytest.mark.parametrize("has_config", [True, False])
def test_files_of_gemma_scope_2(has_config: bool, tmp_path: Path):
    from safetensors.torch import save_file

    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    skip = torch.randn(D, D)
    tensors = {names.get(name, name): tensor for name, tensor in gemma_weights().items()}
    folder = tmp_path / "gemma-scope-2-1b-it" / "transcoder_all" / "layer_3_width_16k_l0_small"
    folder.mkdir(parents=True)
    save_file({**tensors, "affine_skip_connection": skip}, folder / "params.safetensors")
    if has_config:
        config = {
            "architecture": "jump_relu",
            "model_name": "google/gemma-3-1b-it",
            "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
            "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
            "l0": 40,
        }
        (folder / "config.json").write_text(json.dumps(config))
    loaded, x = only(folder), inputs()
    c, output = gemma_values(x)
    assert_computes(loaded, c, output + x @ skip)
    assert (loaded.read_position, loaded.position) == (
        "blocks.3.hook_mlp_in",
        "blocks.3.hook_mlp_out",
    )
    assert loaded.origin.model_name == "google/gemma-3-1b-it"
    assert loaded.origin.stored_metrics == ({"l0": 40.0} if has_config else {})
