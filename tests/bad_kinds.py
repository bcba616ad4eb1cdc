"""Kinds of SAE, loss terms and training aids that are wrong in one way, for `test_bad_input.py`.

`FILES` stands for its folder.
"""

from collections.abc import Mapping
from typing import Any


def _kind(kind: str, **saes: Any) -> dict[str, Any]:
    """SAEs of a kind, of which no sparsity is asked."""
    changes = {f"saes.{name}": value for name, value in saes.items()}
    return {"saes.kind": kind, "loss.sparsity": None, **changes}


def _transcoder(*read_positions: str, **saes: Any) -> dict[str, Any]:
    """One that writes what an MLP does."""
    positions = {"sae_positions": ["blocks.1.hook_mlp_out"], "read_positions": [*read_positions]}
    return _kind("transcoder", **{"k": 2, **positions, **saes})


def _sparsity(**sparsity: Any) -> dict[str, Any]:
    return {f"loss.sparsity.{name}": value for name, value in sparsity.items()}


def _resampling(every: int, until: int) -> dict[str, Any]:
    return {
        "dead_elements": {"after_n_tokens": 64},
        "resampling": {"every_n_samples": every, "until_n_samples": until},
    }


KINDS: dict[str, tuple[Mapping[str, Any], str]] = {
    # Kinds of SAEs
    "unknown kind": (
        {"saes.kind": "top_k"},
        "saes: kind must be one of relu, relu_tied_bias, topk, batch_topk, groupmax, jumprelu, "
        "gated, matryoshka, codebook, transcoder; there is no 'top_k'; did you mean 'topk'?",
    ),
    "kind like no other": ({"saes.kind": "dense"}, "codebook, transcoder; there is no 'dense'\n"),
    "several kinds": ({"saes.kind": ["gated"]}, "transcoder; there is no '['gated']'; did you me"),
    "kind left out": (
        {"saes.k": 2},
        "saes: 'k' belongs to kind topk, batch_topk, groupmax, matryoshka, codebook, transcoder, "
        "not to 'relu'; remove it, or set kind",
    ),
    "setting of another kind": (
        _kind("topk", k=2, bandwidth=0.5),
        "saes: 'bandwidth' belongs to kind jumprelu, not to 'topk'; remove it",
    ),
    "read_positions of another kind": (
        _kind("codebook", k=2, read_positions=["blocks.1.ln2.hook_normalized"]),
        "saes.read_positions: kind codebook reads where it writes; remove it, or take one of relu,",
    ),
    "misspelt setting of a kind": (
        _kind("topk", k=2, multik=4),
        "saes: unknown key 'multik'; did you mean 'multi_k'?",
    ),
    "no k": (_kind("batch_topk"), "saes.k: is required and has no default; set it"),
    "k of zero": (_kind("codebook", k=0), "saes.k: Input should be greater than 0 (given: 0)"),
    "k above the dictionary's size": (
        _kind("topk", k=33),
        "saes.k (33) is above the number of dictionary elements, 32 (dict_size_to_input_ratio 4.0 "
        "* 8); lower it",
    ),
    "multi_k that is no more than k": (
        _kind("topk", k=4, multi_k=4),
        "saes: multi_k (4) must be above k (4); the paper takes 4 * k",
    ),
    "multi_k above the dictionary's size": (
        _kind("topk", k=4, multi_k=33),
        "saes.multi_k (33) is above the number of dictionary elements, 32 (",
    ),
    "prefixes that do not ascend": (
        _kind("matryoshka", k=2, prefix_shares=[0.5, 0.25]),
        "saes.prefix_shares: must ascend, each larger than the one before (given: [0.5, 0.25])",
    ),
    "prefix that is all": (
        _kind("matryoshka", k=2, prefix_shares=[0.5, 1.0]),
        "saes.prefix_shares.1: Input should be less than 1 (given: 1.0)",
    ),
    "prefix that is nothing": (
        _kind("matryoshka", k=2, prefix_shares=[0.0]),
        "saes.prefix_shares.0: Input should be greater than 0 (given: 0.0)",
    ),
    "jumprelu without its scale": (
        {"saes.kind": "jumprelu", "saes.bandwidth": 0.5},
        "saes.initial_threshold: is required and has no default; set it",
    ),
    # Transcoders
    "no read_positions": (
        _kind("transcoder", k=2),
        "saes.read_positions: kind transcoder reads another hook point than it writes; name it",
    ),
    "misspelt read_positions": (
        _transcoder("blocks.1.ln2.hook_normalised"),
        "saes.read_positions: the model has no hook point 'blocks.1.ln2.hook_normalised'; did you",
    ),
    "transcoder that reads what comes later": (
        _transcoder("blocks.2.ln2.hook_normalized"),
        "read_positions: 'blocks.2.ln2.hook_normalized' lies behind 'blocks.1.hook_mlp_out', where "
        "its SAE writes; name a hook point before it",
    ),
    "transcoder that reads what it writes": (
        _transcoder("blocks.1.hook_mlp_out"),
        "read_positions: 'blocks.1.hook_mlp_out' is also where its SAE writes; name a hook",
    ),
    "transcoder that reads two": (
        _transcoder("blocks.1.ln2.hook_normalized", "blocks.0.hook_resid_pre"),
        "read_positions: names 2 hook points (blocks.1.ln2.hook_normalized, "
        "blocks.0.hook_resid_pre), but there are 1 sae_positions",
    ),
    "transcoder that reads no vectors": (
        _transcoder("blocks.1.attn.hook_pattern"),
        "read_positions: 'blocks.1.attn.hook_pattern' has shape (1, 2, 3, 3) for 3 tokens; an SAE",
    ),
    "two SAEs at one position": (
        _kind("topk", k=2, sae_positions=["blocks.2.hook_resid_pre"] * 2),
        "saes.sae_positions: 'blocks.2.hook_resid_pre' is repeated; name it once",
    ),
    # Terms of the loss
    "unknown penalty": (
        _sparsity(penalty="tan"),
        "loss.sparsity.penalty: Input should be 'p_norm', 'tanh', 'log' or 'l0' (given: 'tan')",
    ),
    "p_norm of another penalty": (
        _sparsity(penalty="tanh", p_norm=0.5),
        "loss.sparsity: p_norm (0.5) belongs to penalty p_norm, not to 'tanh'; remove it",
    ),
    "scale of another penalty": (
        _sparsity(scale=2.0),
        "loss.sparsity: scale (2.0) belongs to penalty tanh and log, not to 'p_norm'; remove it",
    ),
    "L0 without a gradient": (
        _sparsity(penalty="l0"),
        "loss.sparsity.penalty (l0) has no gradient in SAEs of kind 'relu', only in jumprelu; choo",
    ),
    "L0 above the dictionary's size": (
        _sparsity(target_l0=33),
        "loss.sparsity.target_l0 (33) is above the number of dictionary elements at "
        "'blocks.1.hook_resid_pre', 32; lower it",
    ),
    "L0 beside k": (
        _kind("topk", k=2) | {"loss.sparsity": {"coeff": 0.1, "target_l0": 4}},
        "loss.sparsity.target_l0 (4): saes.k (2) decides how many elements are active; remove",
    ),
    "moving target without a target": (
        _sparsity(target_warmup_samples=8),
        "target_warmup_samples (8) belongs to target_l0, which is null; set that, or remove it",
    ),
    "target that moves too long": (
        {"saes.kind": "relu", **_sparsity(target_l0=4, target_warmup_samples=10**6)},
        "loss.sparsity.target_warmup_samples (1000000) must be below n_samples",
    ),
    "L0 from a coefficient of zero": (
        _sparsity(target_l0=4, coeff=0),
        "loss.sparsity: coeff (0) is where the controller of target_l0 starts, and it multiplies; ",
    ),
    "sparsity of a codebook": (
        _kind("codebook", k=2) | {"loss.sparsity": {"coeff": 0.1}},
        "loss.sparsity: SAEs of kind 'codebook' have nothing to penalise; set it to null, and saes",
    ),
    "aux_k of a codebook": (
        _kind("codebook", k=2) | {"loss.aux_k": {"coeff": 0.1}},
        "loss.aux_k: elements of kind 'codebook' have no pre-activations; set it to null, and take",
    ),
    "pre_act of another kind": (
        _kind("topk", k=2) | {"loss.pre_act": {"coeff": 0.1}},
        "loss.pre_act: belongs to kind jumprelu, not to 'topk'; set it to null",
    ),
    "balance with nothing": (
        {"loss.logits_kl.balance_with": "out_to_in"},
        "loss: logits_kl.balance_with: out_to_in is null; set it, or remove balance_with",
    ),
    "schedule that changes nothing": (
        _sparsity(schedule={}),
        "loss.sparsity.schedule: changes nothing; set warmup_samples or end_factor, or remove it",
    ),
    "schedule that is too long": (
        _sparsity(schedule={"warmup_samples": 24}),
        "loss.sparsity.schedule.warmup_samples (24) must be below n_samples (24)",
    ),
    # What helps in training
    "aux_k without dead elements": (
        {"loss.aux_k": {"coeff": 0.1}},
        "loss.aux_k works on dead elements; say when one is dead with dead_elements.after_n_tokens",
    ),
    "resampling without dead elements": (
        {"resampling": {"every_n_samples": 8, "until_n_samples": 16}},
        "resampling works on dead elements; say when one is dead with dead_elements.after_n_tokens",
    ),
    "resampling that ends before it starts": (
        _resampling(16, 8),
        "resampling: until_n_samples (8) is below every_n_samples (16), so there is no resampling;",
    ),
    "resampling that never comes": (
        _resampling(48, 96),
        "resampling.every_n_samples (48) is above n_samples (24), so there is no resampling; lower",
    ),
    "decoder_bias of a codebook": (
        _kind("codebook", k=2) | {"decoder_bias": "mean"},
        "decoder_bias (mean): SAEs of kind 'codebook' have none; remove it",
    ),
    "decoder_bias of trained SAEs": (
        {
            "decoder_bias": "geometric_median",
            "saes.pretrained_sae_paths": ["FILES/run"],
            "saes.retrain_saes": True,
        },
        "decoder_bias (geometric_median) would overwrite that of pretrained_sae_paths; remove it",
    ),
    "no tokens ignored": (
        {"ignored_tokens": {"bos": False}},
        "ignored_tokens: leaves no token out; set bos or first_n, or remove it",
    ),
    "all tokens ignored": (
        {"ignored_tokens": {"first_n": 16}},
        "ignored_tokens.first_n (16) leaves no next token to predict in sequences of 16 "
        "(train_data.n_ctx); lower it",
    ),
    "all tokens but the last ignored": (
        {"ignored_tokens": {"first_n": 15}},
        "ignored_tokens.first_n (15) leaves no next token to predict in sequences of 16 (train",
    ),
    "all held-out tokens ignored": (
        {"ignored_tokens": {"first_n": 8}, "eval_data.n_ctx": 8},
        "ignored_tokens.first_n (8) leaves no next token to predict in sequences of 8 (eval_",
    ),
    "BOS that nobody knows": (
        {"ignored_tokens": {"bos": True}, "train_data.tokenizer_name": "FILES/no_bos"},
        "ignored_tokens.bos: the tokenizer of train_data has no BOS token; set first_n instead",
    ),
}
