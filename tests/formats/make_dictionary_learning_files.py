"""Trains tiny SAEs with dictionary-learning, and keeps its files with what it makes of some inputs.

    pip install dictionary-learning==0.1.0    # in an environment of its own, with torch
    python tests/formats/make_dictionary_learning_files.py

`files/dictionary_learning/{class}/` gets the two files that a training leaves, as they are, and
`expected.safetensors`: inputs `x`, their codes `c` and reconstructions `output` by the package.
"""

# pyright: reportMissingImports=false

import json
import shutil
import tempfile
from pathlib import Path

import torch
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers import (
    BatchTopKTrainer,
    GatedSAETrainer,
    JumpReluTrainer,
    StandardTrainer,
    TopKTrainer,
)
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "files" / "dictionary_learning"
D_ACT, N_DICT, N_STEPS = 8, 16, 60
COMMON = {
    "activation_dim": D_ACT,
    "dict_size": N_DICT,
    "layer": 1,
    "lm_name": "EleutherAI/pythia-14m",
    "submodule_name": "resid_post_layer_1",
    "steps": N_STEPS,
    "lr": 1e-2,
    "warmup_steps": 10,
    "seed": 0,
    "device": "cpu",
}
TOP_K = {"k": 3, "threshold_start_step": 5, "threshold_beta": 0.5}
TRAINERS = {
    "AutoEncoder": {"trainer": StandardTrainer, "sparsity_warmup_steps": 10},
    "AutoEncoder_april_update": {
        "trainer": StandardTrainerAprilUpdate,
        "sparsity_warmup_steps": 10,
    },
    "AutoEncoderNew": {"trainer": StandardTrainer, "sparsity_warmup_steps": 10},
    "GatedAutoEncoder": {
        "trainer": GatedSAETrainer,
        "l1_penalty": 0.01,
        "sparsity_warmup_steps": 10,
    },
    "AutoEncoderTopK": {"trainer": TopKTrainer, **TOP_K},
    "BatchTopKSAE": {"trainer": BatchTopKTrainer, **TOP_K},
    "MatryoshkaBatchTopKSAE": {
        "trainer": MatryoshkaBatchTopKTrainer,
        "group_fractions": [0.25, 0.75],
        **TOP_K,
    },
    "JumpReluAutoEncoder": {"trainer": JumpReluTrainer, "sparsity_warmup_steps": 10},
}


def make(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2 * D_ACT, D_ACT, generator=generator)

    def activations(n: int) -> torch.Tensor:
        sources = torch.rand(n, 2 * D_ACT, generator=generator)
        return 3 * (sources * (sources > 0.7)) @ mixing + 0.5

    trainer = {**COMMON, **TRAINERS[name]}
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(
            data=[activations(64) for _ in range(N_STEPS + 1)],
            trainer_configs=[trainer],
            steps=N_STEPS,
            save_dir=folder,
            device="cpu",
        )
        made = Path(folder) / "trainer_0"
        x = 4 * torch.randn(20, D_ACT, generator=generator)
        if name == "AutoEncoderNew":  # which no trainer of this version trains
            torch.manual_seed(0)
            new = AutoEncoderNew(D_ACT, N_DICT)
            for bias in (new.encoder.bias, new.decoder.bias):
                torch.nn.init.normal_(bias)
            torch.save(new.state_dict(), made / "ae.pt")
            config = json.loads((made / "config.json").read_text())
            config["trainer"]["dict_class"] = name
            (made / "config.json").write_text(json.dumps(config, indent=4))
        dictionary, _ = load_dictionary(str(made), "cpu")
        with torch.no_grad():
            c = dictionary.encode(x)
            expected = {"x": x, "c": c.contiguous(), "output": dictionary(x).contiguous()}
        target = FOLDER / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(made, target)
        save_file(expected, target / "expected.safetensors")
        print(name, "L0", (c != 0).sum(1).float().mean().item())


if __name__ == "__main__":
    for name in TRAINERS:
        make(name)
