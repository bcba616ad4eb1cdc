"""SAEs that SAELens wrote compute here what they compute there, and the other way round."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.formats import sae_lens as ours
from sparsify.formats.loaded import LoadedSAE
from sparsify.saes.linear import LinearSAE

sae_lens = pytest.importorskip("sae_lens")
from sae_lens.saes import sae as theirs  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.slow]

D_IN, D_SAE, D_OUT = 8, 24, 5
READS = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}

CONFIGS: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard"},
    "standard_not_centred": {"architecture": "standard", "apply_b_dec_to_input": False},
    "standard_layer_norm": {"architecture": "standard", "normalize_activations": "layer_norm"},
    "topk": {"architecture": "topk", "k": 4},
    "topk_rescaled": {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True},
    "topk_layer_norm": {"architecture": "topk", "k": 4, "normalize_activations": "layer_norm"},
    "topk_not_centred": {"architecture": "topk", "k": 4, "apply_b_dec_to_input": False},
    "jumprelu": {"architecture": "jumprelu"},
    "jumprelu_constant_norm": {
        "architecture": "jumprelu",
        "normalize_activations": "constant_norm_rescale",
        "apply_b_dec_to_input": False,
    },
    "gated": {"architecture": "gated"},
    "gated_not_centred": {"architecture": "gated", "apply_b_dec_to_input": False},
    "hook_z": {
        "architecture": "standard",
        "reshape_activations": "hook_z",
        "metadata": {"hook_name": "blocks.0.attn.hook_z"},
    },
    "transcoder": {"architecture": "transcoder"},
    "skip_transcoder": {"architecture": "skip_transcoder"},
    "jumprelu_transcoder": {"architecture": "jumprelu_transcoder"},
    "jumprelu_skip_transcoder": {"architecture": "jumprelu_skip_transcoder"},
}


def make_theirs(config: dict[str, Any], folder: Path) -> Any:
    """An SAE of SAELens with random weights, and its files."""
    metadata = {"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_pre", "context_size": 128}
    content = {"d_in": D_IN, "d_sae": D_SAE, **config}
    if "transcoder" in config["architecture"]:
        metadata |= READS
        content |= {"d_out": D_OUT, "apply_b_dec_to_input": False}
    content["metadata"] = {**metadata, **config.get("metadata", {})}
    sae_class, config_class = sae_lens.registry.get_sae_class(config["architecture"])
    sae = sae_class(config_class.from_dict(content))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.normal_(0, 0.5)
            if name == "threshold":
                parameter.abs_()
    sae.save_model(folder)
    return sae


def inputs(config: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(1)
    shape = (2, D_IN // 2) if config.get("reshape_activations") == "hook_z" else (D_IN,)
    return 1 + 2 * torch.randn(3, 20, *shape)


def assert_same(theirs: Any, loaded: LoadedSAE, x: torch.Tensor) -> None:
    sae = loaded.sae.eval()
    flat = x.flatten(start_dim=2)
    with torch.no_grad():
        c = theirs.encode(x)
        output = theirs.decode(c) if theirs.cfg.architecture() == "standard" else None
        acts = sae(flat)
        torch.testing.assert_close(acts.c, c, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.encode(flat), c, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            acts.output, theirs(x).flatten(start_dim=2), atol=1e-5, rtol=1e-5
        )
        if output is not None:
            decoded = sae.decode_beside(c, flat)
            torch.testing.assert_close(decoded, output.flatten(start_dim=2), atol=1e-5, rtol=1e-5)
    assert 0.02 < (c != 0).float().mean() < 0.9


@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_sae_lens_compute_the_same_here(name: str, tmp_path: Path):
    other = make_theirs(CONFIGS[name], tmp_path)
    assert ours.recognises(tmp_path)
    (loaded,) = ours.read(tmp_path)
    assert_same(other, loaded, inputs(CONFIGS[name]))
    assert isinstance(loaded.sae, LinearSAE)


@pytest.mark.parametrize("name", CONFIGS)
def test_files_that_we_write_compute_the_same_there(name: str, tmp_path: Path):
    make_theirs(CONFIGS[name], tmp_path / "theirs")
    (loaded,) = ours.read(tmp_path / "theirs")
    ours.write(loaded, tmp_path / "ours")
    other = theirs.SAE.load_from_disk(tmp_path / "ours")
    assert_same(other, loaded, inputs(CONFIGS[name]))
    (again,) = ours.read(tmp_path / "ours")
    assert again.config == loaded.config
    before, after = loaded.sae.state_dict(), again.sae.state_dict()
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[key]) for key, tensor in before.items())
    assert (again.position, again.read_position) == (loaded.position, loaded.read_position)
