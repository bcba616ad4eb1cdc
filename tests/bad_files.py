"""Files that are wrong, and names that nothing has, for `test_bad_input.py`.

`FILES` stands for the folder that `make_bad_files.py` fills.
"""

from collections.abc import Mapping
from typing import Any

from bad_settings import REMOVED

POSITION = "blocks.1.hook_resid_pre"


def _sae(file: str) -> dict[str, Any]:
    return {"saes.pretrained_sae_paths": [f"FILES/{file}"], "saes.retrain_saes": True}


def _tokens(file: str) -> dict[str, Any]:
    return {"train_data.dataset_name": f"FILES/{file}", "train_data.is_tokenized": True}


def _eval(file: str) -> dict[str, Any]:
    return {"dataset_name": f"FILES/{file}", "n_ctx": 16, "is_tokenized": True}


def _text(name: str) -> dict[str, Any]:
    return {"train_data.dataset_name": name}


def _downstream(*positions: str) -> dict[str, Any]:
    return {"loss.in_to_orig": {"hook_positions": list(positions), "total_coeff": 1.0}}


SETTINGS: dict[str, tuple[Mapping[str, Any], str]] = {
    # The model
    "no model": ({"tlens_model_path": REMOVED}, "give either tlens_model_name or tlens_model_path"),
    "two models": (
        {"tlens_model_name": "tiny-python", "tlens_model_processing": "fold"},
        "tlens_model_processing: Input should be 'folded' or 'raw' (given: 'fold')",
    ),
    "misspelt model": (
        {"tlens_model_path": REMOVED, "tlens_model_name": "tiny-pyton"},
        "tlens_model_name: cannot load 'tiny-pyton'; did you mean 'tiny-python'?",
    ),
    "model with code": (
        {"tlens_model_path": REMOVED, "tlens_model_name": "Qwen/Qwen-1_8B"},
        "'Qwen/Qwen-1_8B' may bring Python code, which TransformerLens would execute; if you",
    ),
    "code of a folder": ({"trust_remote_code": True}, "trust_remote_code: no file can allow code"),
    "model is nowhere": (
        {"tlens_model_path": "nowhere"},
        "tlens_model_path: 'nowhere' has no config.json; give the model/ folder of a train_tlens",
    ),
    "model without weights": ({"tlens_model_path": "FILES/no_weights"}, "has no model.safetensors"),
    "model's config is cut": (
        {"tlens_model_path": "FILES/cut_config"},
        "tlens_model_path: 'FILES/cut_config' is damaged (Unterminated string",
    ),
    "model's config is nested": (
        {"tlens_model_path": "FILES/nested_config"},
        "config.json' is damaged (brackets nested too deep); copy the folder again",
    ),
    "model's config has an unknown key": (
        {"tlens_model_path": "FILES/unknown_key"},
        "unknown key 'd_modl'; did you mean 'd_model'?",
    ),
    "model's config has another size": (
        {"tlens_model_path": "FILES/huge"},
        "weights and config.json of 'FILES/huge' do not belong together; copy the folder again",
    ),
    "model's config has more blocks": (
        {"tlens_model_path": "FILES/many_blocks"},
        "(layers.999999999.mlp.fc_in.weight is missing, not (16, 8))",
    ),
    "model's weights are cut": (
        {"tlens_model_path": "FILES/cut_weights"},
        "'FILES/cut_weights' is damaged (Error while deserializing header: incomplete metadata",
    ),
    "model's weights are no safetensors": (
        {"tlens_model_path": "FILES/text_weights"},
        "'FILES/text_weights' is damaged (Error while deserializing header: header too",
    ),
    "model without a tokenizer": (
        {"tlens_model_path": "FILES/no_tokenizer"},
        "tokenizer_name: 'FILES/no_tokenizer' cannot be loaded: ",
    ),
    "tokenizer with code": (
        {"tlens_model_path": "FILES/tokenizer_with_code"},
        "'FILES/tokenizer_with_code' cannot be loaded: The repository FILES/tokenizer_with_code c",
    ),
    # SAEs
    "no position": ({"saes.sae_positions": []}, "saes.sae_positions: names no hook point; give at"),
    "misspelt position": (
        {"saes.sae_positions": ["blocks.1.hook_resid_per"]},
        "saes.sae_positions: the model has no hook point 'blocks.1.hook_resid_per'; did you mean '",
    ),
    "block that is not there": (
        {"saes.sae_positions": ["blocks.9.hook_resid_pre"]},
        "the model has no hook point 'blocks.9.hook_resid_pre'; did you mean 'blocks.2.hook_resid",
    ),
    "position twice": ({"saes.sae_positions": [POSITION] * 2}, f"'{POSITION}' is repeated; name"),
    "position within another": (
        {"saes.sae_positions": [POSITION, "hook_resid_pre"]},
        f"'hook_resid_pre' repeats '{POSITION}', which",
    ),
    "position without vectors": (
        {"saes.sae_positions": ["blocks.1.attn.hook_pattern"]},
        "an SAE needs one vector per token, as at hook_resid_pre",
    ),
    "position behind the blocks": (
        {"saes.sae_positions": ["ln_final.hook_normalized"]},
        "sae_positions: 'ln_final.hook_normalized' lies behind the last block",
    ),
    "ratio zero": (
        {"saes.dict_size_to_input_ratio": 0},
        "saes.dict_size_to_input_ratio: Input should be greater than 0",
    ),
    "ratio too small": (
        {"saes.dict_size_to_input_ratio": 0.1},
        "dict_size_to_input_ratio: 0.1 of an activation of width 8 is less than one dictionary el",
    ),
    "ratio too large": (
        {"saes.dict_size_to_input_ratio": 1e13},
        "makes 80000000000000 dictionary elements, which do not fit into memory; lower it",
    ),
    "ratio beyond counting": (
        {"saes.dict_size_to_input_ratio": 1e30},
        "dict_size_to_input_ratio: 1e+30 of an activation of width 8 makes",
    ),
    "nothing to retrain": ({"saes.retrain_saes": True}, "but there are no pretrained_sae_paths"),
    "nothing to train": (
        {"saes.pretrained_sae_paths": ["FILES/run"]},
        "saes.retrain_saes: false leaves nothing to train",
    ),
    "SAEs are nowhere": (_sae("no.pt"), "FILES/no.pt: there is no such file or folder; check the"),
    "SAEs in an empty folder": (_sae("empty"), "FILES/empty: holds no samples_{N}.safetensors or"),
    "SAEs in another format": (_sae("file"), "FILES/file: weights are read from .safetensors and"),
    "SAEs are cut": (_sae("cut.safetensors"), "FILES/cut.safetensors: is damaged or no weights fi"),
    "SAEs of another shape": (_sae("small.safetensors"), "has weights {'decoder.bias': (4,), "),
    "SAEs of another size": (
        {**_sae("run"), "saes.dict_size_to_input_ratio": 2.0},
        "'decoder.bias': (8,)} were expected; check the model, saes.sae_positions and saes.dict_",
    ),
    "SAEs of another kind": (
        {**_sae("run"), "saes.kind": "batch_topk", "saes.k": 2},
        "its SAEs are of kind 'relu', but saes.kind is 'batch_topk'; set it to 'relu'",
    ),
    "SAEs elsewhere": (_sae("other.safetensors"), "has an SAE for 'blocks-2-hook_resid_pre', but"),
    "SAEs are not finite": (_sae("nan.safetensors"), "numbers that are not finite; use another co"),
    "SAEs are a pickle": (_sae("pickle.pt"), "needs the pickled code 'posix.system', which is nev"),
    "SAEs are a list": (_sae("list.pt"), "FILES/list.pt: holds more than named tensors; save a st"),
    "SAEs are sparse": (
        _sae("sparse.pt"),
        "is not a dense tensor of real numbers (it is torch.float",
    ),
    "SAEs are shapes": (_sae("meta.pt"), "(it is torch.float32, torch.strided, on meta)"),
    "SAEs are complex": (_sae("complex.pt"), "(it is torch.complex64, torch.strided, on cpu)"),
    "SAEs are compressed": (_sae("zip_bomb.pt"), "(it is compressed, which torch.save never does)"),
    "SAEs of any size": (
        _sae("bytes_bomb.pt"),
        "(it makes a bytearray, which is not a tensor); use",
    ),
    "SAEs with long texts": (_sae("long.pt"), "(it has a text of more than 5,000 characters); use"),
    "SAEs twice": (
        {"saes.pretrained_sae_paths": ["FILES/run", "FILES/run/samples_16.safetensors"]},
        f"'FILES/run/samples_16.safetensors' both have an SAE for {POSITION}; name one of them",
    ),
    # The loss
    "no term": ({"loss": {}}, "loss: has no term, so there is nothing to train; set one of sparsi"),
    "every coefficient zero": (
        {"loss": {"sparsity": {"coeff": 0}}},
        "loss: sparsity: every coefficient is 0, so there is nothing to train; set one above 0",
    ),
    "negative coefficient": (
        {"loss.sparsity.coeff": -1},
        "loss.sparsity.coeff: Input should be greater than or equal to 0 (given: -1)",
    ),
    "no coefficient": ({"loss.sparsity": {}}, "loss.sparsity.coeff: is required and has no defaul"),
    "norm zero": ({"loss.sparsity.p_norm": 0}, "loss.sparsity.p_norm: Input should be greater tha"),
    "nothing downstream": (_downstream(), "loss.in_to_orig.hook_positions: names no hook point; n"),
    "misspelt downstream": (
        _downstream("blocks.2.hook_resid_pots"),
        "loss.in_to_orig.hook_positions: the model has no hook point 'blocks.2.hook_resid_pots'",
    ),
    "downstream before the SAE": (
        _downstream("blocks.0.hook_resid_mid"),
        "'blocks.0.hook_resid_mid' does not lie behind the first SAE, at 'blocks.1.hook_resid_pre'",
    ),
    "downstream behind the blocks": (
        _downstream("ln_final.hook_normalized"),
        "loss.in_to_orig.hook_positions: 'ln_final.hook_normalized' lies behind the last block",
    ),
    # Data
    "data are nowhere": (_text("./nothing"), "dataset_name: there is no file or folder './nothing"),
    "home of nobody": (
        _text("~nobody-here/x"),
        "'~nobody-here/x': there is no home folder '~nobody-",
    ),
    "data without a name": (
        _text(""),
        "train_data.dataset_name: String should have at least 1 cha",
    ),
    "name that is too long": (_text("./" + "n" * 300), "nnn); check the path"),
    "dataset of nobody": (_text("no-such-data"), "'no-such-data' (split 'train') cannot be read: "),
    "misspelt dataset": (_text("python-stdlb"), "'python-stdlb' is unknown; did you mean 'python-"),
    "split that is not there": (
        {"train_data": {"dataset_name": "python-stdlib", "split": "test", "n_ctx": 16}},
        "train_data: split: python-stdlib has no split 'test'; use one of train, validation",
    ),
    "split of text": ({"train_data.split": "test"}, "split: text files have no split 'test' ("),
    "empty folder": (_text("FILES/empty"), "dataset_name: 'FILES/empty' is empty; name a file or"),
    "empty file": (_text("FILES/empty.txt"), "dataset_name: 'FILES/empty.txt' is empty; name a fi"),
    "text in latin-1": (_text("FILES/latin1.txt"), "'FILES/latin1.txt' is not UTF-8 text; convert"),
    "less than a batch of text": (
        _text("FILES/short.txt"),
        "'FILES/short.txt' holds 0 sequences, less than one batch of 4; use more data, a smaller",
    ),
    "less than a batch of held-out text": (
        {"eval_data": {"dataset_name": "FILES/short2.txt", "n_ctx": 16}},
        "dataset_name: 'FILES/short2.txt' holds 0 sequences",
    ),
    "broken row": (_text("FILES/broken.jsonl"), "FILES/broken.jsonl' cannot be read: line "),
    "column that is not there": (
        _text("FILES/code.jsonl"),
        "column_name: 'FILES/code.jsonl' has no column 'text'; set it to one of code",
    ),
    "column of text for ids": (
        {**_tokens("code.jsonl"), "train_data.column_name": "code"},
        "is_tokenized: column 'code' of 'FILES/code.jsonl' holds text, not lists of token ids; set",
    ),
    "column of numbers": (_text("FILES/numbers.jsonl"), "holds values of type int, not text; set "),
    "damaged table": (_text("FILES/cut.parquet"), "'FILES/cut.parquet' cannot be read: "),
    "ids of text": ({"train_data.is_tokenized": True}, "is_tokenized: True: has no meaning for te"),
    "id beyond the vocabulary": (
        {"eval_data": _eval("large.parquet")},
        "'FILES/large.parquet' has token id 1000, but the model knows 300 ids; use data made with",
    ),
    "id beyond 64 bits": (
        {"eval_data": _eval("huge.parquet")},
        "'FILES/huge.parquet' has token id 9223372036854775809, but the model knows 300 ids",
    ),
    "negative id": ({"eval_data": _eval("negative.parquet")}, "has token id -1, but ids start at "),
    "rows of another length": (_tokens("rows_of_8.parquet"), "n_ctx: a row of 'FILES/rows_of_8.pa"),
    "n_ctx above the model's": (
        {"train_data.n_ctx": 17},
        "n_ctx: 17 is beyond the model's context of 16; use at most 16",
    ),
    "n_ctx of one": ({"train_data.n_ctx": 1}, "train_data: n_ctx: 1 leaves no next token to predi"),
    "BOS in ids": (
        {"train_data.is_tokenized": True, "train_data.add_bos_token": True},
        "add_bos_token: true cannot be combined with is_tokenized: true",
    ),
    "tokenizer is nowhere": (
        {"train_data.tokenizer_name": "./nowhere"},
        "tokenizer_name: './nowhere' cannot be loaded: ",
    ),
    "tokenizer is cut": (
        {"train_data.tokenizer_name": "FILES/cut_tokenizer"},
        "tokenizer_name: 'FILES/cut_tokenizer' cannot be loaded: Unterminated string",
    ),
    "tokenizer with too many ids": (
        {"train_data.tokenizer_name": "FILES/large_tokenizer"},
        "has token ids up to 319, but the model's vocabulary has 300 ids from 0; use the tokenize",
    ),
}
