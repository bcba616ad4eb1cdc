"""Models with SAEs of other tools compute what they compute with that tool's own splicing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify import SAETransformer
from sparsify.settings.base_config import UserError

sae_lens = pytest.importorskip("sae_lens")

pytestmark = [pytest.mark.model, pytest.mark.slow]

POSITION = "blocks.1.hook_resid_pre"


def save_sae(folder: Path, d_in: int, architecture: str, **settings: Any) -> Any:
    sae_class, config_class = sae_lens.registry.get_sae_class(architecture)
    content = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": 3 * d_in,
        "metadata": {"model_name": "tiny", "hook_name": POSITION},
        **settings,
    }
    sae = sae_class(config_class.from_dict(content))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(0, 0.3)
    sae.save_model(folder)
    return sae


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("standard", {}),
        ("topk", {"k": 5, "normalize_activations": "layer_norm"}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {"apply_b_dec_to_input": False}),
        ("gated", {}),
    ],
)
def test_logits_are_those_of_sae_lens(
    architecture: str, settings: dict[str, Any], tiny_model: Any, tmp_path: Path
):
    theirs = save_sae(tmp_path, tiny_model.cfg.d_model, architecture, **settings)
    spliced = sae_lens.HookedSAETransformer(tiny_model.cfg)
    spliced.load_state_dict(tiny_model.state_dict())
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = spliced.eval().run_with_saes(tokens, saes=[theirs])
        raw = spliced(tokens)
        model = SAETransformer.from_pretrained(tmp_path, tiny_model)
        logits, acts = model(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (expected - raw).abs().max() > 0.01
    assert list(acts) == [POSITION]


def test_what_does_not_fit_the_model_is_refused(tiny_model: Any, tmp_path: Path):
    d_in = tiny_model.cfg.d_model
    far = {"model_name": "tiny", "hook_name": "blocks.9.hook_resid_pr"}
    save_sae(tmp_path / "wide", 2 * d_in, "standard")
    save_sae(tmp_path / "far", d_in, "standard", metadata=far)
    save_sae(tmp_path / "folded", d_in, "standard")
    content = json.loads((tmp_path / "folded" / "cfg.json").read_text())
    content["metadata"]["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    (tmp_path / "folded" / "cfg.json").write_text(json.dumps(content))
    refusals = {
        "wide": f"the SAE at {POSITION} reads activations of width {2 * d_in}",
        "far": "the model has no hook point 'blocks.9.hook_resid_pr'; did you mean 'blocks.",
        "folded": "on a model with folded layer norms and centred weights, but this one has weight",
    }
    for name, message in refusals.items():
        with pytest.raises(UserError, match=message):
            SAETransformer.from_pretrained(tmp_path / name, tiny_model)
