"""Makes tiny SAEs with eai-sparsify, and keeps its files with what it makes of some inputs.

    pip install eai-sparsify==1.3.3    # in an environment of its own: it imports as `sparsify`
    cd tests/formats && python -P make_eai_sparsify_files.py

`files/eai_sparsify/{name}/{hook}/` gets the files that the package writes, and beside them
`expected.safetensors`: inputs `x`, the codes `c` and outputs `output` by the package.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from sparsify import SparseCoder, SparseCoderConfig

FOLDER = Path(__file__).parent / "files" / "eai_sparsify"
D_ACT, N_LATENTS = 8, 24
CODERS = {
    "topk/layers.1": SparseCoderConfig(k=3, num_latents=N_LATENTS),
    "expansion/layers.0.mlp": SparseCoderConfig(k=4, expansion_factor=3),
    "groupmax/layers.1": SparseCoderConfig(k=4, num_latents=N_LATENTS, activation="groupmax"),
    "skip/layers.1": SparseCoderConfig(k=3, num_latents=N_LATENTS, skip_connection=True),
    "transcoder/layers.1.mlp": SparseCoderConfig(k=3, num_latents=N_LATENTS, transcode=True),
    "skip_transcoder/layers.1.mlp": SparseCoderConfig(
        k=3, num_latents=N_LATENTS, transcode=True, skip_connection=True
    ),
    "several/layers.0": SparseCoderConfig(k=3, num_latents=N_LATENTS),
    "several/layers.1": SparseCoderConfig(k=3, num_latents=N_LATENTS),
    "seeds/layers.1/seed1": SparseCoderConfig(k=3, num_latents=N_LATENTS),
}


def make(name: str, config: SparseCoderConfig) -> None:
    torch.manual_seed(len(name))
    coder = SparseCoder(D_ACT, config)
    with torch.no_grad():
        # As after a training: nothing is zero, and decoders have about unit norm.
        coder.encoder.bias.normal_(0, 0.1)
        coder.b_dec.normal_(0, 0.5)
        coder.W_dec.add_(0.1 * torch.randn_like(coder.W_dec))
        if config.normalize_decoder and not config.transcode:
            coder.set_decoder_norm_to_unit_norm()
            coder.W_dec.mul_(1 + 0.01 * torch.randn(len(coder.W_dec), 1))
        if coder.W_skip is not None:
            coder.W_skip.normal_(0, 0.3)
        x = 2 * torch.randn(20, D_ACT)
        acts, index, _ = coder.encode(x)
        c = torch.zeros(len(x), coder.num_latents).scatter_(1, index, acts)
        output = coder(x).sae_out
    target = FOLDER / name
    shutil.rmtree(target, ignore_errors=True)
    coder.save_to_disk(target)
    expected = {"x": x, "c": c.contiguous(), "output": output.contiguous()}
    save_file(expected, target / "expected.safetensors")
    print(name, "L0", (c != 0).sum(1).float().mean().item())


if __name__ == "__main__":
    for name, config in CODERS.items():
        make(name, config)
