import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.settings.base_config import UserError
from sparsify.tlens.architecture import Architecture
from sparsify.tlens.hooked_model import TLENS_HAS_HOOKED_TRANSFORMER, HookedModel, Prefix
from sparsify.tlens.loading import (
    Processing,
    build_bridge,
    load_hooked_model,
    models_of_tlens,
)
from sparsify.tlens.native_model import TrainableModel, load_native_model, save_language_model
from sparsify.tlens.tokenizers import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.model

SIZES = {"n_layers": 2, "d_model": 12, "n_heads": 3, "d_mlp": 20, "n_ctx": 8, "d_vocab": 270}


def save(folder: Path, norm: str = "LN", positions: str = "rotary") -> TrainableModel:
    """A model with weights unlike those it begins with, and its tokenizer."""
    folder.mkdir(exist_ok=True)
    fields = {"normalization_type": norm, "positional_embedding_type": positions}
    model = TrainableModel(Architecture.model_validate(SIZES | fields), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    save_language_model(folder, model, torch.float32)
    train_tokenizer(["def f():\n    return 1\n"] * 4, vocab_size=262).save_pretrained(folder)
    return model.eval()


def load(folder: Path, kind: str, processing: Processing) -> Any:  # either kind of model
    if kind == "bridge":
        return build_bridge(*load_native_model(folder), load_tokenizer(str(folder)), processing)
    return load_hooked_model(None, folder, processing)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(270, (2, 8))


@pytest.mark.parametrize("norm", ["LN", "RMS"])
@pytest.mark.parametrize("positions", ["rotary", "standard"])
@pytest.mark.parametrize("kind", ["default", "bridge"])
def test_hooked_models_predict_what_the_trained_model_predicts(
    norm: str, positions: str, kind: str, tokens: Tensor, tmp_path: Path
):
    expected = save(tmp_path, norm, positions)(tokens).log_softmax(dim=-1)
    for processing in ("raw", "folded"):
        model = load(tmp_path, kind, processing)
        log_probs = model(tokens).log_softmax(dim=-1)
        torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["default", "bridge"])
def test_processing_changes_activations(kind: str, tokens: Tensor, tmp_path: Path):
    trained = save(tmp_path)
    resid = {}
    for processing in ("raw", "folded"):
        model = HookedModel(load(tmp_path, kind, processing))
        resid[processing] = model.run(Prefix(tokens), {}, 1).detach()
    first, *_ = trained.native.layers
    expected = first(trained.native.tok_embed(tokens))[0].detach()
    torch.testing.assert_close(resid["raw"], expected, rtol=1e-4, atol=1e-4)
    # Folded: every vector that is written has mean zero.
    centred = resid["folded"].mean(dim=-1)
    torch.testing.assert_close(centred, torch.zeros_like(centred), rtol=0, atol=1e-5)
    assert resid["raw"].mean(dim=-1).abs().max() > 0.01


def test_model_has_the_tokenizer_of_its_folder(tmp_path: Path):
    save(tmp_path)
    model: Any = load_hooked_model(None, tmp_path, "folded")
    ids = model.to_tokens("def f", prepend_bos=False)
    assert model.tokenizer.decode(ids[0]) == "def f"
    assert model.to_tokens("def f")[0, 0] == 0  # the token that begins a text
    text = model.generate("def", max_new_tokens=3, verbose=False)
    assert text.startswith("def")


def test_folder_without_a_model_is_rejected(tmp_path: Path):
    with pytest.raises(UserError, match=r"^tlens_model_path: .* has no config\.json"):
        load_hooked_model(None, tmp_path / "nowhere", "folded")


def test_folder_without_a_tokenizer_is_rejected(tmp_path: Path):
    save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_hooked_model(None, tmp_path, "folded")


@pytest.mark.parametrize("processing", ["folded", "raw"])
def test_unknown_name_is_rejected(processing: Processing):
    with pytest.raises(UserError, match=r"^tlens_model_name: cannot load 'no-such-model'"):
        load_hooked_model("no-such-model", None, processing)


@pytest.mark.skipif(not TLENS_HAS_HOOKED_TRANSFORMER, reason="a bridge asks the hub")
def test_misspelt_name_gets_the_nearest():
    with pytest.raises(UserError) as error:
        load_hooked_model("gpt2-smal", None, "folded")
    assert str(error.value) == (
        "tlens_model_name: cannot load 'gpt2-smal'; did you mean 'gpt2-small'? (TransformerLens "
        "has no model of this name); tiny-python needs no network"
    )


def test_registry_of_the_bridge_is_the_list_where_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, "transformer_lens.supported_models", None)
    assert "openai-community/gpt2" in models_of_tlens()


def test_code_of_a_model_is_executed_only_if_it_is_trusted(monkeypatch: pytest.MonkeyPatch):
    trusted: list[bool] = []

    def boot(*_: object, trust_remote_code: bool = False, **__: object) -> None:
        trusted.append(trust_remote_code)
        raise OSError("no network")

    where = "HookedTransformer.from_pretrained"
    if not TLENS_HAS_HOOKED_TRANSFORMER:
        where = "model_bridge.TransformerBridge.boot_transformers"
    monkeypatch.setattr(f"transformer_lens.{where}", boot)
    with pytest.raises(UserError, match=r"trust_remote_code|cannot load"):
        load_hooked_model("Qwen/Qwen-1_8B", None, "folded")
    # TransformerLens 3.9 trusts it on its own account, so it must not even be asked.
    assert trusted == ([] if TLENS_HAS_HOOKED_TRANSFORMER else [False])
    with pytest.raises(UserError, match="cannot load 'Qwen/Qwen-1_8B'"):
        load_hooked_model("Qwen/Qwen-1_8B", None, "folded", trust_remote_code=True)
    assert trusted[-1]


CODE = "from pathlib import Path\nPath('executed').touch()\n"
AUTO_MAP = {
    "AutoConfig": "code.Config",
    "AutoModelForCausalLM": "code.Model",
    "AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"],
}


def plant(folder: Path) -> None:
    """A folder of a model whose code makes a file in the working directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "code.py").write_text(CODE)
    for name in ("config.json", "tokenizer_config.json"):
        content = {"model_type": "own", "auto_map": AUTO_MAP, "architectures": ["Model"]}
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("trusts", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Qwen/Qwen-1_8B", "Qwen/Qwen-1_8B"),
        ("qwen/qwen-1_8b", "Qwen/Qwen-1_8B"),
        ("qwen-1.8b", "Qwen/Qwen-1_8B"),
        ("gpt2-small", "gpt2"),
        ("run/model", "run/model"),
        ("./run/model", "run/model"),
    ],
)
def test_a_name_means_no_folder_of_the_working_directory(
    name: str, folder: str, trusts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    plant(tmp_path / folder)
    if name != folder and not name.startswith(".") and not TLENS_HAS_HOOKED_TRANSFORMER:
        pytest.skip("other versions know no other names")
    with pytest.raises(UserError, match=r"is also a file or folder in .* tlens_model_path"):
        load_hooked_model(name, None, "folded", trust_remote_code=trusts)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_in_the_folder_of_a_model_is_not_executed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model")
    plant(tmp_path / "planted")
    (tmp_path / "planted" / name).replace(tmp_path / "model" / name)
    (tmp_path / "planted" / "code.py").replace(tmp_path / "model" / "code.py")
    with contextlib.suppress(UserError):
        load_hooked_model(None, tmp_path / "model", "folded", trust_remote_code=True)
    assert not (tmp_path / "executed").exists()


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.skipif(os.name == "nt", reason="no pipes there")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "folder"])
def test_what_is_no_file_in_the_folder_of_a_model_is_refused(kind: str, name: str, tmp_path: Path):
    save(tmp_path)
    path = tmp_path / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(40_000_000_000)
    with pytest.raises(UserError, match=r"tlens_model_path|tokenizer_name"):
        load_hooked_model(None, tmp_path, "folded")


@pytest.mark.slow
def test_bundled_model_writes_python():
    model: Any = load_hooked_model("tiny-python", None, "folded")
    text = model.generate("import ", max_new_tokens=4, do_sample=False, verbose=False)
    assert text.startswith("import ")
    with torch.no_grad():
        nats = model(model.to_tokens("for i in range(len(self.items)):\n"), return_type="loss")
    assert nats < 5  # ln 4096 = 8.3 would be a guess
