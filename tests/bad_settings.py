"""Configs that are wrong in one way, for `test_bad_input.py`. `FILES` stands for its folder."""

import math
from collections.abc import Callable, Mapping
from typing import Any

REMOVED = object()
"""Value of a setting that is left out."""

HUGE = 10**30

MakeText = Callable[[str], str | bytes]


TEXTS: dict[str, tuple[MakeText, str]] = {
    "unclosed bracket": (
        lambda text: text + "device: [cpu\n",
        "config.yaml: is not valid YAML; fix this: while parsing a flow sequence",
    ),
    "tab": (lambda text: text + "wandb:\n\t- 1\n", r"found character '\t' that cannot start"),
    "key twice": (lambda text: text + "lr: 1\n", "fix this: the key 'lr' is given twice"),
    "list": (lambda _: "- lr: 1\n", "config.yaml: holds list, not 'key: value' lines"),
    "empty": (lambda _: "", "config.yaml: holds nothing, not 'key: value' lines"),
    "two documents": (lambda text: f"{text}---\nlr: 1\n", "expected a single document"),
    "binary": (lambda _: b"\x89PNG\xff\x00", "fix this: 'utf-8' codec can't decode byte 0x89"),
    "latin-1": (
        lambda text: f"wandb_run_name: caf\xe9\n{text}".encode("latin-1"),
        "can't decode byte 0xe9 in position 19",
    ),
    "code": (
        lambda text: f"{text}seed: !!python/object/apply:os.system ['touch FILES/planted']\n",
        "fix this: tags (!) are not supported; write the value alone, or put text that begins so",
    ),
    "wrong tag": (
        lambda text: f"{text}mixed_precision: !!bool perhaps\n",
        "fix this: tags (!) are not supported",
    ),
    "date": (lambda text: f"{text}seed: 2024-02-31\n", "unable to parse string as an integer"),
    "sexagesimal": (
        lambda text: f"{text}max_grad_norm: 1:30:{'0' * 5000}\n",
        "max_grad_norm: Input should be a valid number, unable to parse string as a number",
    ),
    "octal": (
        lambda text: f"{text}seed: 0o17\n",
        "seed: Input should be a valid integer, unable to parse string as an integer (given: '0o1",
    ),
    "number of 5000 digits": (
        lambda text: f"{text}seed: {'9' * 5000}\n",
        "Exceeds the limit (4300 digits) for integer string conversion",
    ),
    "hexadecimal number of 5000 digits": (
        lambda text: f"{text}seed: 0x{'f' * 5000}\n",
        "seed: Input should be a valid integer, unable to parse string as an integer (given: '0xff",
    ),
    "nested brackets": (lambda _: f"lr: {'[' * 1000}", "lines are nested too deep"),
    "anchor": (
        lambda text: f"{text}a: &a [1]\n",
        "fix this: anchors (&), aliases (*) and",
    ),
    "alias": (
        lambda text: f"{text}a: *b\n",
        "(<<) are not supported; write the values",
    ),
    "merge key": (
        lambda text: f"{text}a: {{<<: {{b: 1}}}}\n",
        "text that begins so in quotes\n",
    ),
    "large file": (lambda text: text + "# more\n" * 20_000, "more than 100,000 characters"),
    "NUL": (
        lambda text: f'{text}wandb_project: "a\\0b"\n',
        "a character that no name and no path can have",
    ),
}


SETTINGS: dict[str, tuple[Mapping[str, Any], str]] = {
    # Keys and types
    "unknown key": ({"n_sample": 8}, "unknown key 'n_sample'; did you mean 'n_samples'?"),
    "unknown term": (
        {"loss.sparsty": {"coeff": 1}},
        "loss: unknown key 'sparsty'; did you mean 'sparsity'?",
    ),
    "key left out": ({"lr": REMOVED}, "lr: is required and has no default; set it"),
    "word for number": (
        {"lr": "fast"},
        "lr: Input should be a valid number, unable to parse string as a number (given: 'fast')",
    ),
    "fraction of a sample": ({"n_samples": 24.5}, "got a number with a fractional part (given: 24"),
    "boolean for number": ({"lr": True}, "lr: Input should be a number (given: True)"),
    "boolean for count": ({"keep_last": False}, "keep_last: Input should be a number (given: Fal"),
    "number for name": ({"wandb_project": 5}, "wandb_project: Input should be a valid string (giv"),
    "word for boolean": (
        {"mixed_precision": "perhaps"},
        "mixed_precision: Input should be a valid boolean, unable to interpret input (given: 'per",
    ),
    "mapping left out": ({"loss": None}, "loss: Input should be a valid dictionary or instance of"),
    # Numbers
    "negative": ({"lr": -0.1}, "lr: Input should be greater than 0 (given: -0.1)"),
    "not a number": ({"lr": math.nan}, "lr: Input should be a finite number (given: nan)"),
    "infinite": ({"max_grad_norm": math.inf}, "max_grad_norm: Input should be a finite number (gi"),
    "overflow": ({"lr": "1e999"}, "lr: Input should be a finite number (given: '1e999')"),
    "no samples": ({"n_samples": 0}, "n_samples: Input should be greater than 0 (given: 0)"),
    "samples beyond counting": (
        {"eval_n_samples": HUGE},
        f"eval_n_samples: Input should be less than 9223372036854775808 (given: {HUGE})",
    ),
    "negative seed": ({"seed": -1}, "seed: Input should be greater than or equal to 0 (given: -1)"),
    # Lengths and schedules
    "batches that do not divide": (
        {"batch_size": 3},
        "effective_batch_size (8) must be a multiple of batch_size (3)",
    ),
    "less than a batch": ({"n_samples": 4}, "n_samples (4) must be at least one effective batch"),
    "long warmup": ({"warmup_samples": 24}, "warmup_samples (24) must be below n_samples (24)"),
    "warmup and cooldown": (
        {"lr_schedule": "linear", "warmup_samples": 20, "cooldown_samples": 8},
        "warmup_samples (20) and cooldown_samples (8) must together be at most n_samples (24)",
    ),
    "unknown schedule": (
        {"lr_schedule": "step"},
        "lr_schedule: Input should be 'linear', 'cosine' or 'constant' (given: 'step')",
    ),
    "linear without a fall": ({"lr_schedule": "linear"}, "so it never falls; set cooldown_samples"),
    "cooldown of a cosine": ({"cooldown_samples": 4}, "is not used by 'cosine'; remove it"),
    "floor of a constant": (
        {"lr_schedule": "constant", "min_lr_factor": 0.5},
        "min_lr_factor (0.5) is not used by lr_schedule 'constant'; remove it",
    ),
    "evaluation without data": (
        {"eval_data": None, "eval_every_n_samples": 8},
        "eval_every_n_samples (8) needs eval_data, which is null",
    ),
    "compile without a KL": (
        {"compile": True, "loss.logits_kl": None, "loss.out_to_in": {"coeff": 1.0}},
        "compile: true has no effect without loss.logits_kl, whose kernel it compiles; remove it",
    ),
    "count without a period": (
        {"act_frequency_n_tokens": 3},
        "act_frequency_n_tokens (3) has no effect while collect_act_frequency_every_n_samples is",
    ),
    # Where the run goes
    "run name with a slash": ({"wandb_run_name": "a/b"}, "wandb_run_name: the run's name 'a/b' al"),
    "run name that climbs": ({"wandb_run_name": "../../x"}, "name '../../x' also names its folder"),
    "run name of dots": ({"wandb_run_name": ".."}, "name '..' also names its folder, so it must h"),
    "run name of two lines": ({"wandb_run_name": "a\nb"}, r"name 'a\nb' also names its folder, so"),
    "empty run name": (
        {"wandb_run_name": ""},
        "wandb_run_name: String should have at least 1 character (given: '')",
    ),
    "long run name": ({"wandb_run_name": "n" * 250}, "so it must have at most 200 bytes; cha"),
    "prefix with a slash": ({"wandb_run_name_prefix": "/tmp/"}, "the run's name '/tmp/"),
    "saves without a folder": (
        {"save_dir": None, "save_every_n_samples": 8},
        "save_every_n_samples (8) needs a save_dir, which is null; set a folder or remove",
    ),
    "save_dir is a file": ({"save_dir": "FILES/file"}, "save_dir: cannot write to 'FILES/file' ("),
    "save_dir below a file": ({"save_dir": "FILES/file/out"}, "cannot write to 'FILES/file/out' ("),
    "save_dir that is too long": ({"save_dir": "d" * 300}, "ddd' (File name too long); choose a"),
    "unknown device": (
        {"device": "gpu"},
        "device: Input should be 'auto', 'cpu', 'cuda' or 'mps' (given: 'gpu')",
    ),
    "token in the config": (
        {"train_data.tokenizer_name": "hf_" + "Ab3" * 10},
        "train_data.tokenizer_name: holds an access token, which would be saved with the run",
    ),
}

ARGUMENTS: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown option": (("--lrr", "1"), "unknown option '--lrr'; did you mean '--lr'?"),
    "option without a value": (("--lr",), "argument --lr: expected one argument; see --help"),
    "word for number, as option": (("--lr", "1", "--lr", "slow"), "as a number (given: 'slow')"),
    "half a mapping": (("--loss", "{"), 'error parsing value for field "loss"'),
    "half a list": (("--saes.sae_positions", "[x"), "saes.sae_positions: Missing end delimiter"),
    "resume nothing": (("--resume", "nowhere"), "resume: there is no folder 'nowhere'; give the"),
    "resume a file": (("--resume", "FILES/file"), "resume: there is no folder 'FILES/file'; give"),
    "resume an empty folder": (
        ("--resume", "FILES/empty"),
        "resume: 'FILES/empty' is not a run of this script, or its config is damaged; give anothe",
    ),
    "resume the newest of none": (("--resume",), "has a checkpoint to resume from; start one with"),
    "resume what is too long": (("--resume", "r" * 300), "rrr'; give the folder of a run"),
}
