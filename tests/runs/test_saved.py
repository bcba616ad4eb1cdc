import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from sparsify import SAETransformer
from sparsify.runs.config import SAETransformerConfig
from sparsify.runs.saved import build_sae_transformer, load_saes, model_identity
from sparsify.settings.base_config import UserError
from sparsify.tlens.architecture import Architecture
from sparsify.tlens.native_model import TrainableModel, save_language_model
from sparsify.tlens.tokenizers import train_tokenizer

pytestmark = pytest.mark.model

POSITIONS = ["blocks.0.attn.hook_z", "blocks.1.hook_resid_pre"]
SIZES = {"n_layers": 2, "d_model": 12, "n_heads": 3, "d_mlp": 20, "n_ctx": 8, "d_vocab": 270}


def save_lm(folder: Path, seed: int) -> Path:
    folder.mkdir()
    model = TrainableModel(Architecture.model_validate(SIZES), seed=seed)
    save_language_model(folder, model, torch.float16)
    train_tokenizer(["def f():\n    return 1\n"] * 4, vocab_size=262).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("lms") / "model", seed=0)


@pytest.fixture(scope="module")
def other_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("lms") / "model", seed=1)


def config_of(lm: Path, **saes: object) -> SAETransformerConfig:
    fields = {"sae_positions": POSITIONS, "dict_size_to_input_ratio": 2.0}
    content = {"tlens_model_path": lm, "tlens_model_processing": "raw", "saes": fields | saes}
    return SAETransformerConfig.model_validate(content)


def save_run(run_dir: Path, config: SAETransformerConfig) -> Path:
    """The config among other settings, as a training script writes it."""
    run_dir.mkdir(exist_ok=True)
    content = config.model_dump(mode="json") | {"lr": 0.1, "loss": {"sparsity": {"coeff": 1.0}}}
    (run_dir / "final_config.yaml").write_text(yaml.safe_dump(content))
    return run_dir


def save_checkpoint(path: Path, model: SAETransformer, config: SAETransformerConfig) -> Path:
    weights = {name: tensor.clone() for name, tensor in model.saes.state_dict().items()}
    if path.suffix == ".pt":
        torch.save(weights, path)
    else:
        save_file(weights, path, metadata=model_identity(config))
    return path


@pytest.fixture
def run_dir(lm: Path, tmp_path: Path) -> Path:
    return save_run(tmp_path / "run", config_of(lm))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(270, (2, 8))


def assert_same(loaded: SAETransformer, saved: SAETransformer, tokens: Tensor) -> None:
    assert loaded.raw_sae_positions == saved.raw_sae_positions
    (logits, acts), (expected, expected_acts) = loaded(tokens), saved(tokens)
    assert torch.equal(logits, expected)
    for position in POSITIONS:
        assert torch.equal(acts[position].c, expected_acts[position].c)


# Round trips


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_saved_run_gives_the_same_outputs(lm: Path, run_dir: Path, tokens: Tensor, suffix: str):
    saved = build_sae_transformer(config_of(lm), "cpu")
    save_checkpoint(run_dir / f"samples_8.{suffix}", saved, config_of(lm))
    loaded = SAETransformer.from_local_path(run_dir)
    assert_same(loaded, saved, tokens)
    assert_same(SAETransformer.from_local_path(str(run_dir / f"samples_8.{suffix}")), saved, tokens)
    assert not any(parameter.requires_grad for parameter in loaded.tlens_model.parameters())


def test_loaded_run_continues_text(lm: Path, run_dir: Path):
    saved = build_sae_transformer(config_of(lm), "cpu")
    save_checkpoint(run_dir / "samples_8.safetensors", saved, config_of(lm))
    loaded = SAETransformer.from_local_path(run_dir)
    assert loaded.to_tokens("def f").shape[0] == 1
    text = loaded.generate("def", max_new_tokens=3)
    assert isinstance(text, str)
    assert text.startswith("def")


def test_newest_checkpoint_is_loaded(lm: Path, run_dir: Path, tokens: Tensor):
    models = {}
    for name in ("samples_4.safetensors", "samples_12.pt", "samples_8.safetensors"):
        models[name] = build_sae_transformer(config_of(lm), "cpu")
        save_checkpoint(run_dir / name, models[name], config_of(lm))
    loaded = SAETransformer.from_local_path(run_dir)
    assert_same(loaded, models["samples_12.pt"], tokens)  # 12 is more than 8, though "12" < "8"
    older = SAETransformer.from_local_path(run_dir / "samples_4.safetensors")
    assert_same(older, models["samples_4.safetensors"], tokens)


def test_run_may_have_had_patterns_and_pretrained_saes(lm: Path, tmp_path: Path, tokens: Tensor):
    config = config_of(
        lm, sae_positions="hook_resid_pre", pretrained_sae_paths="long/gone.pt", retrain_saes=True
    )
    run_dir = save_run(tmp_path / "run", config)
    full = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    saved = build_sae_transformer(config_of(lm, sae_positions=full), "cpu")
    save_checkpoint(run_dir / "samples_8.safetensors", saved, config)
    loaded = SAETransformer.from_local_path(run_dir)
    assert loaded.raw_sae_positions == full
    assert torch.equal(loaded(tokens)[0], saved(tokens)[0])


def test_model_folder_may_be_moved(lm: Path, tmp_path: Path, tokens: Tensor):
    saved = build_sae_transformer(config_of(lm), "cpu")
    moved = shutil.copytree(lm, tmp_path / "moved")
    run_dir = save_run(tmp_path / "run", config_of(moved))
    save_checkpoint(run_dir / "samples_8.safetensors", saved, config_of(lm))
    assert_same(SAETransformer.from_local_path(run_dir), saved, tokens)


# Pretrained SAEs


@pytest.mark.parametrize("retrain", [False, True])
def test_pretrained_saes_are_frozen_unless_retrained(lm: Path, tmp_path: Path, retrain: bool):
    one = config_of(lm, sae_positions=POSITIONS[:1])
    saved = build_sae_transformer(one, "cpu")
    path = save_checkpoint(tmp_path / "samples_8.safetensors", saved, one)
    config = config_of(lm, pretrained_sae_paths=[path], retrain_saes=retrain)
    model = build_sae_transformer(config, "cpu")
    old, new = (model.saes.at(position) for position in POSITIONS)
    torch.testing.assert_close(old.state_dict(), saved.saes.at(POSITIONS[0]).state_dict())
    assert {parameter.requires_grad for parameter in old.parameters()} == {retrain}
    assert all(parameter.requires_grad for parameter in new.parameters())


def test_pretrained_saes_may_come_from_several_files(lm: Path, tmp_path: Path, tokens: Tensor):
    whole = build_sae_transformer(config_of(lm), "cpu")
    paths = []
    for index, position in enumerate(POSITIONS):
        one = config_of(lm, sae_positions=[position])
        saved = build_sae_transformer(one, "cpu")
        saved.saes.at(position).load_state_dict(whole.saes.at(position).state_dict())
        paths.append(save_checkpoint(tmp_path / f"{index}.safetensors", saved, one))
    assert_same(
        build_sae_transformer(config_of(lm, pretrained_sae_paths=paths), "cpu"), whole, tokens
    )


def test_pretrained_saes_may_be_those_of_a_run(lm: Path, run_dir: Path, tokens: Tensor):
    whole = build_sae_transformer(config_of(lm), "cpu")
    save_checkpoint(run_dir / "samples_8.safetensors", whole, config_of(lm))
    model = build_sae_transformer(config_of(lm, pretrained_sae_paths=run_dir), "cpu")
    assert_same(model, whole, tokens)


# Refusals


def test_two_pretrained_saes_of_one_position_are_rejected(lm: Path, tmp_path: Path):
    saved = build_sae_transformer(config_of(lm), "cpu")
    paths = [
        save_checkpoint(tmp_path / f"{name}.safetensors", saved, config_of(lm)) for name in "ab"
    ]
    message = f"'{paths[0]}' and '{paths[1]}' both have an SAE for {POSITIONS[0]}; name one"
    with pytest.raises(UserError, match=re.escape(message)):
        build_sae_transformer(config_of(lm, pretrained_sae_paths=paths), "cpu")


def test_device_that_is_not_there_is_rejected(lm: Path, run_dir: Path):
    save_checkpoint(
        run_dir / "samples_8.safetensors",
        build_sae_transformer(config_of(lm), "cpu"),
        config_of(lm),
    )
    if torch.mps.is_available():
        return
    with pytest.raises(UserError, match="device: torch sees no 'mps' on this machine"):
        SAETransformer.from_local_path(run_dir, device="mps")


def test_checkpoint_of_another_model_is_rejected(
    lm: Path, other_lm: Path, run_dir: Path, tmp_path: Path
):
    saved = build_sae_transformer(config_of(other_lm), "cpu")
    save_checkpoint(run_dir / "samples_8.safetensors", saved, config_of(other_lm))
    message = r"samples_8\.safetensors: its SAEs were trained with tlens_model 'weights "
    with pytest.raises(UserError, match=message):
        SAETransformer.from_local_path(run_dir)
    config = config_of(lm, pretrained_sae_paths=[run_dir / "samples_8.safetensors"])
    with pytest.raises(UserError, match=message):
        build_sae_transformer(config, "cpu")


def test_checkpoint_of_another_processing_is_rejected(lm: Path, run_dir: Path):
    config = config_of(lm)
    folded = config.model_copy(update={"tlens_model_processing": "folded"})
    save_checkpoint(run_dir / "samples_8.safetensors", build_sae_transformer(folded, "cpu"), folded)
    with pytest.raises(UserError, match="with tlens_model_processing 'folded', not 'raw'"):
        SAETransformer.from_local_path(run_dir)


@pytest.mark.parametrize(
    ("saes", "message"),
    [
        (
            {"dict_size_to_input_ratio": 3.0},
            "check the model, saes.sae_positions and saes.dict_size",
        ),
        ({"sae_positions": POSITIONS[:1]}, "has no SAE for blocks.1.hook_resid_pre"),
        (
            {"sae_positions": [*POSITIONS, "hook_embed"]},
            "has an SAE for 'hook_embed', but sae_positions are blocks.0.attn.hook_z, ",
        ),
    ],
)
def test_checkpoint_of_other_saes_is_rejected(
    lm: Path, run_dir: Path, saes: dict[str, Any], message: str
):
    saved = build_sae_transformer(config_of(lm, **saes), "cpu")
    save_checkpoint(run_dir / "samples_8.safetensors", saved, config_of(lm))
    with pytest.raises(UserError, match=message):
        SAETransformer.from_local_path(run_dir)


def test_checkpoint_that_lacks_a_weight_is_rejected(lm: Path, run_dir: Path):
    saved = build_sae_transformer(config_of(lm), "cpu")
    weights = dict(saved.saes.state_dict())
    del weights["blocks-1-hook_resid_pre.decoder.bias"]
    save_file(weights, run_dir / "samples_8.safetensors")
    with pytest.raises(UserError, match="the SAE 'blocks-1-hook_resid_pre' has weights"):
        SAETransformer.from_local_path(run_dir)


@pytest.mark.parametrize("name", ["samples_8.safetensors", "samples_8.pt"])
def test_damaged_checkpoint_is_rejected(run_dir: Path, name: str):
    (run_dir / name).write_bytes(b"torn")
    with pytest.raises(UserError, match=name):
        SAETransformer.from_local_path(run_dir)


def test_empty_checkpoint_is_rejected(lm: Path, run_dir: Path):
    torch.save({}, run_dir / "samples_8.pt")
    with pytest.raises(UserError, match=r"has no SAE for blocks\.0\.attn\.hook_z, blocks\.1"):
        SAETransformer.from_local_path(run_dir)


def test_folder_without_a_run_is_rejected(lm: Path, run_dir: Path, tmp_path: Path):
    with pytest.raises(UserError, match="nowhere: there is no such file"):
        SAETransformer.from_local_path(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no samples_\{N\}\.safetensors"):
        SAETransformer.from_local_path(run_dir)
    saved = build_sae_transformer(config_of(lm), "cpu")
    save_checkpoint(run_dir / "samples_8.safetensors", saved, config_of(lm))
    (run_dir / "final_config.yaml").unlink()
    with pytest.raises(UserError, match=r"final_config\.yaml: cannot be read"):
        SAETransformer.from_local_path(run_dir)


def test_training_state_is_no_checkpoint(lm: Path, run_dir: Path):
    saved = build_sae_transformer(config_of(lm), "cpu")
    save_checkpoint(run_dir / "samples_8.safetensors", saved, config_of(lm))
    torch.save({"n_samples": 8}, run_dir / "state_8.pt")
    message = r"state_8\.pt: is the training state; .* in \S*/run/samples_8\.safetensors, give"
    with pytest.raises(UserError, match=message):
        SAETransformer.from_local_path(run_dir / "state_8.pt")


def test_unknown_position_is_rejected(lm: Path):
    config = config_of(lm, sae_positions=["blocks.1.hook_resid_pots"])
    message = r"^saes\.sae_positions: .* did you mean 'blocks\.1\.hook_resid_post'"
    with pytest.raises(UserError, match=message):
        build_sae_transformer(config, "cpu")


def test_loading_says_which_saes_it_loaded(lm: Path, tmp_path: Path):
    config = config_of(lm)
    model = build_sae_transformer(config, "cpu")
    path = save_checkpoint(tmp_path / "samples_8.safetensors", model, config)
    assert load_saes(model, path, model_identity(config)) == POSITIONS
