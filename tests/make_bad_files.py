"""Makes the files of `bad_files.py` out of good ones."""

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from sparsify.tlens.tokenizers import train_tokenizer

Change = Callable[[bytes], bytes]


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, planted: Path) -> None:
        self.planted = planted

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.planted}",)


def change(path: Path, how: Change) -> None:
    path.write_bytes(how(path.read_bytes()))


def first_half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def with_keys(**keys: Any) -> Change:
    return lambda content: json.dumps({**json.loads(content), **keys}).encode()


def seal(run_dir: Path, n_samples: int = 24) -> None:
    """Make the checksums of a checkpoint those of its files."""
    manifest = run_dir / f"checkpoint_{n_samples}.json"
    content = json.loads(manifest.read_text())
    for name in content["sha256"]:
        content["sha256"][name] = hashlib.sha256((run_dir / name).read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))


def make_bad_files(folder: Path, planted: Path, model: Path, run_dir: Path) -> None:
    """Fill `folder`.

    Args:
        folder: A folder that exists.
        planted: What pickles would make.
        model: Model folder of a language model.
        run_dir: SAEs of that model after 8, 16 and 24 samples.
    """
    make_bad_data(folder / "data")
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    make_texts(folder)
    make_tables(folder)
    make_models(folder, planted, model)
    make_saes(folder, planted, load_file(run_dir / "samples_24.safetensors"))
    make_runs(folder, planted, run_dir)
    shutil.copytree(model.parent, folder / "lm")


def make_texts(folder: Path) -> None:
    (folder / "empty.txt").touch()
    (folder / "latin1.txt").write_bytes("café".encode("latin-1") * 100)
    for name in ("short.txt", "short2.txt"):
        (folder / name).write_text("def f(): pass\n")
    (folder / "broken.jsonl").write_text('{"text": "x"}\n{"text": \n')
    (folder / "code.jsonl").write_text('{"code": "x = 1"}\n')
    (folder / "numbers.jsonl").write_text('{"text": 3}\n')


def make_tables(folder: Path) -> None:
    rows = {"large": [1000] * 16, "negative": [-1] * 16, "rows_of_8": [1] * 8}
    columns = {name: pa.array([row] * 8) for name, row in rows.items()}
    columns["huge"] = pa.array([[2**63 + 1] * 16] * 8, pa.list_(pa.uint64()))
    for name, column in columns.items():
        pq.write_table(pa.table({"input_ids": column}), folder / f"{name}.parquet")
    (folder / "cut.parquet").write_bytes(first_half((folder / "large.parquet").read_bytes()))


def make_models(folder: Path, planted: Path, model: Path) -> None:
    changes: dict[str, tuple[str, Change]] = {
        "cut_config": ("config.json", lambda content: content[:20]),
        "nested_config": ("config.json", lambda _: b"[" * 100_000),
        "unknown_key": ("config.json", with_keys(d_modl=3)),
        "huge": ("config.json", with_keys(d_model=2**40)),
        "many_blocks": ("config.json", with_keys(n_layers=10**9)),
        "cut_weights": ("model.safetensors", first_half),
        "text_weights": ("model.safetensors", lambda _: b"weights"),
        "cut_tokenizer": ("tokenizer.json", lambda content: content[:50]),
        "tokenizer_with_code": (
            "tokenizer_config.json",
            with_keys(tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]}),
        ),
    }
    for name, (file, how) in changes.items():
        shutil.copytree(model, folder / name)
        change(folder / name / file, how)
    (folder / "tokenizer_with_code" / "own.py").write_text(f"open({str(planted)!r}, 'w')\n")
    for name, file in (("no_weights", "model.safetensors"), ("no_tokenizer", "tokenizer.json")):
        shutil.copytree(model, folder / name, ignore=shutil.ignore_patterns(file))
    texts = [f"def {chr(97 + index)}{index}(): return {index}\n" for index in range(200)]
    train_tokenizer(texts, 320).save_pretrained(folder / "large_tokenizer")
    without_bos = train_tokenizer(texts, 280)
    without_bos.bos_token = None
    without_bos.save_pretrained(folder / "no_bos")


def make_saes(folder: Path, planted: Path, weights: dict[str, torch.Tensor]) -> None:
    def map_weights(function: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: function(tensor).clone() for name, tensor in weights.items()}

    save_file(
        map_weights(lambda w: w[:4] if w.ndim == 1 else w[:4, :4]), folder / "small.safetensors"
    )
    save_file(map_weights(lambda w: w * torch.nan), folder / "nan.safetensors")
    save_file(
        {name.replace("blocks-1", "blocks-2"): tensor for name, tensor in weights.items()},
        folder / "other.safetensors",
    )
    (folder / "cut.safetensors").write_bytes(first_half((folder / "nan.safetensors").read_bytes()))
    torch.save([1], folder / "list.pt")
    torch.save({"x" * 10_000: torch.ones(1)}, folder / "long.pt")
    torch.save({"weight": Hostile(planted)}, folder / "pickle.pt")
    torch.save(map_weights(torch.Tensor.to_sparse), folder / "sparse.pt")
    torch.save(map_weights(lambda w: w.to("meta")), folder / "meta.pt")
    torch.save(map_weights(lambda w: w.to(torch.complex64)), folder / "complex.pt")
    make_bombs(folder)


def make_bombs(folder: Path) -> None:
    """Two files of a few kB that torch.load would make 40 MB, or any number of bytes, of."""
    whole = folder / "zeros.pt"
    torch.save({"weight": torch.zeros(10_000_000)}, whole)
    with (
        zipfile.ZipFile(whole) as source,
        zipfile.ZipFile(folder / "zip_bomb.pt", "w", zipfile.ZIP_DEFLATED) as zip_bomb,
        zipfile.ZipFile(folder / "bytes_bomb.pt", "w") as bytes_bomb,
    ):
        for name in source.namelist():
            zip_bomb.writestr(name, source.read(name))
            if name.endswith("data.pkl"):
                bytes_bomb.writestr(name, pickled_bytearray(10**10))
            elif "/data/" not in name:
                bytes_bomb.writestr(name, source.read(name))
    whole.unlink()


def pickled_bytearray(size: int) -> bytes:
    """The pickle of the call `bytearray(size)`."""
    digits = size.to_bytes(8, "little")
    call = b"cbuiltins\nbytearray\n" + pickle.LONG1 + bytes([8]) + digits + pickle.TUPLE1
    return pickle.PROTO + b"\2" + call + pickle.REDUCE + pickle.STOP


def make_runs(folder: Path, planted: Path, run_dir: Path) -> None:
    def copy(name: str) -> Path:
        return shutil.copytree(run_dir, folder / name)

    def copy_of_last(name: str) -> Path:
        """Without another checkpoint to fall back on."""
        path = copy(name)
        (path / "checkpoint_16.json").unlink()
        return path

    copy("run")
    (copy("no_config") / "final_config.yaml").unlink()
    (copy_of_last("no_json") / "checkpoint_24.json").write_text("{")
    (copy_of_last("no_state") / "state_24.pt").unlink()
    change(copy_of_last("cut_state") / "state_24.pt", first_half)
    change(copy_of_last("flipped_state") / "state_24.pt", flipped_bit)
    change(copy_of_last("flipped_weights") / "samples_24.safetensors", flipped_bit)
    states = {"other_state": {"n": 1}, "list_state": [1], "pickle_state": {"n": Hostile(planted)}}
    for name, state in states.items():
        torch.save(state, copy_of_last(name) / "state_24.pt")
        seal(folder / name)
    weights = copy_of_last("other_weights") / "samples_24.safetensors"
    save_file({"blocks-7-hook_resid_pre.encoder.0.bias": torch.ones(2)}, weights)
    seal(folder / "other_weights")
    torch.save({"weight": Hostile(planted)}, copy("pickle_weights") / "samples_99.pt")
    (folder / "victim").write_text("untouched")
    metrics = copy("link") / "metrics.jsonl"
    metrics.unlink()
    metrics.symlink_to(folder / "victim")


def make_bad_data(folder: Path) -> None:
    """Make the data of `bad_data.py`."""
    row = json.dumps({"text": "value = 1"}) + "\n"
    for name in ("mixed/a.jsonl", "splits/train.jsonl", "splits/more.jsonl", "set1.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(row * 99)
    pq.write_table(pa.table({"text": ["value = 1"]}), folder / "mixed" / "b.parquet")
    (folder / "a.csv").write_text("text\nvalue = 1\n")
    (folder / "bytes.jsonl").write_bytes(b'{"text": "\xff"}\n')
    os.mkfifo(folder / "pipe.jsonl")
    Dataset.from_dict({"text": ["value = 1"] * 99}).save_to_disk(folder / "saved", num_shards=2)
    (folder / "saved" / "data-00001-of-00002.arrow").unlink()
    backend = train_tokenizer(["value = 1"], vocab_size=257).backend_tokenizer
    for name, tokens in {"no_end": {"unk_token": "a"}, "no_bos": {"eos_token": "b"}}.items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
        tokenizer.save_pretrained(folder / name)
