"""Tiny files that packages wrote compute here what the packages made of some inputs.

`make_*_files.py` made them.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsify.formats import dictionary_learning, eai_sparsify
from sparsify.formats.loaded import LoadedSAE

FILES = Path(__file__).parent / "files"
FOLDERS = {
    f"{format.__name__.rpartition('.')[2]}/{expected.parent.relative_to(FILES / folder)}": (
        format,
        expected.parent,
    )
    for format, folder in (
        (dictionary_learning, "dictionary_learning"),
        (eai_sparsify, "eai_sparsify"),
    )
    for expected in sorted((FILES / folder).rglob("expected.safetensors"))
}


def assert_as_expected(loaded: LoadedSAE, folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    sae = loaded.sae.eval()
    with torch.no_grad():
        acts = sae(expected["x"])
        torch.testing.assert_close(acts.c, expected["c"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(acts.output, expected["output"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.encode(expected["x"]), acts.c, atol=0, rtol=0)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_computes_what_its_package_computed(name: str):
    format, folder = FOLDERS[name]
    assert format.recognises(folder)
    (loaded,) = format.read(folder)
    assert_as_expected(loaded, folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_written_and_read_again_it_is_the_same_to_the_bit(name: str, tmp_path: Path):
    format, folder = FOLDERS[name]
    (loaded,) = format.read(folder)
    target = tmp_path / folder.relative_to(FILES).relative_to(folder.relative_to(FILES).parts[0])
    format.write(loaded, target)
    (again,) = format.read(target)
    assert (again.config, again.position) == (loaded.config, loaded.position)
    before, after = loaded.sae.state_dict(), again.sae.state_dict()
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[key]) for key, tensor in before.items())
    assert_as_expected(again, folder)
