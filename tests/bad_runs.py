"""Runs that cannot be gone on with, begun or loaded, for `test_bad_input.py`.

Names of runs are those of folders that `make_bad_files.py` makes.
"""

from collections.abc import Mapping
from typing import Any

GOES_ON = {"save_every_n_samples": 8, "n_samples": 32}

RESUMED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "manifest is no JSON": ("no_json", (), "FILES/no_json/checkpoint_24.json: is damaged"),
    "state is cut": ("cut_state", (), "state_24.pt: is damaged, its checksum is not that in check"),
    "state has a flipped bit": (
        "flipped_state",
        (),
        "FILES/flipped_state/state_24.pt: is damaged,",
    ),
    "weights have a flipped bit": (
        "flipped_weights",
        (),
        "samples_24.safetensors: is damaged, its",
    ),
    "state is gone": ("no_state", (), "FILES/no_state/state_24.pt: is missing"),
    "config is gone": (
        "no_config",
        (),
        "'FILES/no_config' is not a run of this script, or its config",
    ),
    "run of another script": (
        "lm",
        (),
        "resume: 'FILES/lm' is not a run of this script, or its confi",
    ),
    "state of another script": (
        "other_state",
        (),
        "state_24.pt: does not fit this run: state.firing is missing; use the version of the",
    ),
    "state is a list": ("list_state", (), "state_24.pt: holds list, not a training state"),
    "state is a pickle": ("pickle_state", (), "state_24.pt: needs the pickled code 'posix.system'"),
    "weights of another run": (
        "other_weights",
        (),
        "this version of the script (RuntimeError: ",
    ),
    "metrics are a link": (
        "link",
        (),
        "resume: 'FILES/link/metrics.jsonl' is a link, through whic",
    ),
    "another setting": (
        "run",
        ("--lr", "1"),
        "but given are lr: 1.0 instead of 0.01; remove the c",
    ),
    "fewer samples": (
        "run",
        ("--n_samples", "8"),
        "n_samples (8) must be at least 24, since the r",
    ),
    "state no longer kept": (
        "run/samples_8.safetensors",
        (),
        "has no training state any more, since keep_last keeps that of the last ones; resume from",
    ),
}

LANGUAGE_MODELS: dict[str, tuple[Mapping[str, Any], str]] = {
    "heads that do not divide": (
        {"model.n_heads": 3},
        "model: n_heads (3) must divide d_model (8)",
    ),
    "model too large": ({"model.d_model": 2**50}, "n_ctx=16, d_vocab=300, act_fn='gelu', normaliz"),
    "vocabulary too large": (
        {"model.d_vocab": 270},
        "tokenizer.vocab_size (280) is above model.d_",
    ),
    "vocabulary too small": (
        {"tokenizer.vocab_size": 10},
        "vocab_size: 10 is too small for the 25",
    ),
    "no tokenizer": (
        {"tokenizer": None},
        "give either tokenizer or train_data.tokenizer_name, and",
    ),
}

LOADED: dict[str, tuple[str, str]] = {
    "run is nowhere": ("nowhere", "FILES/nowhere: there is no such file or folder; check the path"),
    "run without a config": ("no_config", "FILES/no_config/final_config.yaml: cannot be read (No"),
    "run's SAEs are a pickle": (
        "pickle_weights",
        "samples_99.pt: needs the pickled code 'posix.sy",
    ),
    "run's SAEs are of another": ("other_weights", "has an SAE for 'blocks-7-hook_resid_pre', but"),
}
