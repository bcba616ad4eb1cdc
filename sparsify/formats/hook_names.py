"""Hook points as TransformerLens names them, from what other tools call the same places."""

import re

_BLOCK = r"(?:(?:model|transformer|gpt_neox)\.)?(?:layers|h|blocks)\.(\d+)"
_MODULES = (
    # A block's output; its MLP and attention, whose outputs are added to the residual stream.
    (re.compile(rf"{_BLOCK}"), "hook_resid_post"),
    (re.compile(rf"{_BLOCK}\.mlp"), "hook_mlp_out"),
    (re.compile(rf"{_BLOCK}\.(?:self_attn|attn|attention)"), "hook_attn_out"),
)
_EMBEDDING = re.compile(r"(?:(?:model|transformer|gpt_neox)\.)?(?:embed_tokens|wte|embed_in)")
_INPUTS = {"hook_mlp_out": "mlp.hook_in", "hook_attn_out": "attn.hook_in"}
_DICTIONARY_LEARNING = (
    (re.compile(r"resid_post_layer_(\d+)"), "hook_resid_post"),
    (re.compile(r"mlp_(?:out|layer)_?(?:layer_)?(\d+)"), "hook_mlp_out"),
    (re.compile(r"attention_(?:out_)?layer_(\d+)"), "hook_attn_out"),
)


def hook_name_of_module(module: str) -> str | None:
    """Return the hook point of a Hugging Face module's output (`layers.10.mlp`). None: not known.

    The hook point of a bridge of TransformerLens (`blocks.3.hook_out`) is taken, too.
    """
    if module.startswith("blocks.") and "hook" in module:
        return module
    if _EMBEDDING.fullmatch(module):
        return "hook_embed"
    for pattern, hook in (*_MODULES, *_DICTIONARY_LEARNING):
        if match := pattern.fullmatch(module):
            return f"blocks.{match[1]}.{hook}"
    return None


def hook_name_of_input(output: str) -> str | None:
    """Return the hook point that a part reads, from the one of its output. None: not known.

    It is behind the layer norm with its weights, where bridges alone have a hook point.
    """
    block, _, hook = output.rpartition(".")
    return f"{block}.{_INPUTS[hook]}" if hook in _INPUTS else None
