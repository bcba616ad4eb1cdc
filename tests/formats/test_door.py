"""Sources are recognised by what is in them, and bad ones give one message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.formats import FORMATS, WRITERS, load, wandb_runs
from sparsify.settings.base_config import UserError

FILES = Path(__file__).parent / "files"
TOPK = FILES / "dictionary_learning" / "AutoEncoderTopK"
EAI = FILES / "eai_sparsify" / "topk" / "layers.1"


class Planted:
    """Executes code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("PLANTED"),))


def sae_lens_folder(folder: Path, **config: Any) -> None:
    content = {
        "architecture": "standard",
        "d_in": 4,
        "d_sae": 6,
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.1.hook_resid_pre"},
        **config,
    }
    (folder / "cfg.json").write_text(json.dumps(content))
    shapes = {"W_enc": (4, 6), "W_dec": (6, 4), "b_enc": (6,), "b_dec": (4,)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "sae_weights.safetensors")


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "sae_weights.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


def nothing(folder: Path) -> None:
    """Leave the folder empty."""


def other_files(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"x")


def several(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        sae_lens_folder(folder / name)


def wrong_width(folder: Path) -> None:
    sae_lens_folder(folder, d_in=5)


def wrong_bias(folder: Path) -> None:
    sae_lens_folder(folder)
    change_tensors(folder, b_enc=torch.ones(5))


def turned(folder: Path) -> None:
    sae_lens_folder(folder)
    change_tensors(folder, W_dec=torch.ones(4, 6))


def without_bias(folder: Path) -> None:
    sae_lens_folder(folder)
    change_tensors(folder, b_dec=None)


def with_nan(folder: Path) -> None:
    sae_lens_folder(folder)
    change_tensors(folder, W_dec=torch.full((6, 4), torch.nan))


def lying_header(folder: Path) -> None:
    sae_lens_folder(folder)
    path = folder / "sae_weights.safetensors"
    header = json.dumps({"W_enc": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 16)


def no_json(folder: Path) -> None:
    sae_lens_folder(folder)
    (folder / "cfg.json").write_text("{")


def temporal(folder: Path) -> None:
    sae_lens_folder(folder, architecture="temporal")


def whitened(folder: Path) -> None:
    sae_lens_folder(folder, normalize_activations="covariance_whitening")


def topk_without_k(folder: Path) -> None:
    sae_lens_folder(folder, architecture="topk", k=0)


def one_head(folder: Path) -> None:
    sae_lens_folder(folder, metadata={"hook_name": "x", "hook_head_index": 3})


def pickled_code(folder: Path) -> None:
    shutil.copytree(TOPK, folder, dirs_exist_ok=True)
    torch.save({"encoder.weight": Planted()}, folder / "ae.pt")


def unknown_class(folder: Path) -> None:
    shutil.copytree(TOPK, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "CrossCoder"}}))


def another_k(folder: Path) -> None:
    shutil.copytree(TOPK, folder, dirs_exist_ok=True)
    content = json.loads((folder / "config.json").read_text())
    content["trainer"]["k"] = 7
    (folder / "config.json").write_text(json.dumps(content))


def array_of_objects(folder: Path) -> None:
    arrays = {"W_enc": np.ones((4, 6)), "W_dec": np.array([Planted()], dtype=object)}
    np.savez(folder / "params.npz", **arrays)


def across_layers(folder: Path) -> None:
    tensors = {
        **{"w_enc": torch.ones(4, 6), "w_dec": torch.ones(6, 3, 4)},
        **{"b_enc": torch.ones(6), "b_dec": torch.ones(3, 4), "threshold": torch.ones(6)},
    }
    save_file(tensors, folder / "params.safetensors")


def signed(folder: Path) -> None:
    shutil.copytree(EAI, folder, dirs_exist_ok=True)
    content = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**content, "signed": True}))


def wrong_latents(folder: Path) -> None:
    shutil.copytree(EAI, folder, dirs_exist_ok=True)
    content = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**content, "num_latents": 25}))


BAD: dict[Callable[[Path], None], str] = {
    nothing: "is empty, which is no known format; known are a run of sparsify",
    other_files: "holds weights.bin, which is no known format",
    several: "holds several SAEs; name one: a, b",
    wrong_width: "d_in is 5, but W_enc has 4; the files do not belong together",
    wrong_bias: r"the encoder's bias has shape \(5,\), but the encoder, of 6 elements for activa",
    turned: r"the decoder has shape \(4, 6\), but the encoder, of 6 elements",
    without_bias: "has no 'b_dec', but",
    with_nan: "the decoder holds numbers that are not finite; use another copy",
    lying_header: "is damaged or no weights file",
    no_json: "cfg.json: is not JSON; use another copy",
    temporal: "architecture 'temporal' is none that this package has: standard, topk",
    whitened: "normalize_activations 'covariance_whitening' is none that this package has",
    topk_without_k: "k is 0, not a whole number above 0",
    one_head: "hook_head_index: the SAE reads one head alone",
    pickled_code: "needs the pickled code 'getattr', which is never executed",
    unknown_class: "dict_class 'CrossCoder' is none of AutoEncoder, AutoEncoderNew",
    another_k: "k is 7, but 3 in ae.pt; the files do not belong together",
    array_of_objects: "is damaged, or holds more than arrays of numbers",
    across_layers: "is a cross-layer transcoder, whose elements write 3 layers",
    signed: "signed: true is none that this package has",
    wrong_latents: r"says 25 latents of width 8, but encoder.weight has shape \(24, 8\)",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_a_bad_source_is_one_message_and_executes_nothing(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "source").mkdir()
    make(folder)
    with pytest.raises(UserError, match=BAD[make]) as error:
        load(folder)
    assert "Traceback" not in str(error.value)
    assert not Path("PLANTED").exists()


def test_a_run_folder_of_several_hook_points_gives_them_all():
    loaded = load(FILES / "eai_sparsify" / "several")
    assert list(loaded) == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert loaded["blocks.0.hook_resid_post"].n_dict == 24


def test_each_file_is_recognised_by_one_format_alone():
    for folder in (TOPK, EAI):
        assert sum(module.recognises(folder) for module in FORMATS.values()) == 1


def test_what_is_nowhere_and_cannot_be_had_is_one_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="there is no such file or folder; give one, a repositor"):
        load("./nowhere")
    for outside in ("nobody/nothing:../../etc", "wandb:../../run"):
        with pytest.raises(UserError, match="there is no such file or folder; check the path"):
            load(outside)
    with pytest.raises(UserError, match="nobody/nothing: cannot be had from the hub"):
        load("nobody/nothing:sub/folder")


@pytest.mark.parametrize("target", WRITERS)
@pytest.mark.parametrize("source", ["AutoEncoder", "AutoEncoderTopK", "GatedAutoEncoder"])
def test_an_sae_goes_from_one_format_to_another_or_is_refused_by_name(
    source: str, target: str, tmp_path: Path
):
    folder = FILES / "dictionary_learning" / source
    (entry,) = load(folder).entries.values()
    writable = {
        "saelens": {"AutoEncoder", "AutoEncoderTopK", "GatedAutoEncoder"},
        "dictionary_learning": {"AutoEncoder", "AutoEncoderTopK", "GatedAutoEncoder"},
        "eai_sparsify": {"AutoEncoderTopK"},
        "neel_nanda": {"AutoEncoder"},
    }
    out = tmp_path / "layers.1"
    if source not in writable[target]:
        with pytest.raises(UserError, match=f"'{entry.config.kind}'"):
            WRITERS[target].write(entry, out)
        return
    WRITERS[target].write(entry, out)
    (again,) = load(out).entries.values()
    x = load_file(folder / "expected.safetensors")["x"]
    with torch.no_grad():
        before, after = entry.sae(x), again.sae(x)
    torch.testing.assert_close(after.c, before.c, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(after.output, before.output, atol=1e-6, rtol=1e-6)
    assert again.position == entry.position


class File:
    """A file of a run of wandb, whose service cannot be reached in a test."""

    def __init__(self, source: Path) -> None:
        self.name = source.name
        self.source = source

    def download(self, root: str) -> None:
        target = Path(root) / self.name
        target.write_bytes(self.source.read_bytes()[:7])
        if self.source.stat().st_size > 7:
            raise ConnectionError("the network is gone")


def test_a_download_that_ends_early_leaves_no_file(tmp_path: Path):
    (whole := tmp_path / "whole.pt").write_bytes(b"1234567")
    (cut := tmp_path / "cut.pt").write_bytes(b"12345678")
    wandb_runs._download(File(whole), tmp_path / "cache")
    with pytest.raises(ConnectionError):
        wandb_runs._download(File(cut), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["whole.pt"]
