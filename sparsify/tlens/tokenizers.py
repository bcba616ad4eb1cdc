"""Loads tokenizers, and trains a small one."""

import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsify.settings.base_config import UserError
from sparsify.settings.files import open_regular
from sparsify.settings.secrets import one_line

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
MAX_TOKENIZER_BYTES = 200_000_000
"""The largest have about 30 MB."""
_BUNDLED = {"tiny-python": Path(__file__).parent.parent / "assets" / "tiny_python"}


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A fast tokenizer.

    Args:
        name: `tiny-python` (bundled), a name on the Hugging Face hub, or a folder: a `Path`, or
            text with a slash.

    Raises:
        UserError: There is no such tokenizer, it cannot be had, it is not a fast one, or its name
            on the hub is also that of a file or folder here.
    """
    source = _source(name)
    _check_files(Path(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # transformers passes on the errors of the hub client, the network, and its own of several
    # kinds; all mean that the tokenizer named by the person cannot be loaded.
    except Exception as error:
        raise UserError(
            f"tokenizer_name: '{name}' cannot be loaded: {one_line(error)}; name "
            f"tiny-python, a folder with tokenizer.json, or a tokenizer of the hub (this needs a "
            f"network)"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer_name: '{name}' has no fast version (tokenizer.json); use one that has"
        )
    return tokenizer


def _source(name: str | Path) -> str:
    """Return where transformers finds a tokenizer. It looks into the working directory first."""
    if isinstance(name, Path):
        return str(name.absolute())
    if name in _BUNDLED:
        return str(_BUNDLED[name])
    if "/" not in name and os.path.lexists(name):
        raise UserError(
            f"tokenizer_name: '{name}' is also a file or folder in '{os.getcwd()}', which would be "
            f"loaded in place of the tokenizer of that name; write ./{name} if the folder is "
            "meant, else rename it or work in another folder"
        )
    return name


def _check_files(folder: Path) -> None:
    """See that a folder has files alone: transformers would wait for a pipe, or read a device."""
    if not os.path.isdir(folder):
        return
    for path in folder.iterdir():
        if path.suffix not in TOKENIZER_SUFFIXES:
            continue
        try:
            open_regular(path, MAX_TOKENIZER_BYTES).close()
        except OSError as error:
            raise UserError(
                f"tokenizer_name: '{path}' cannot be read ({error.strerror}); check the folder"
            ) from None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, whose token 0 both begins and ends a text.

    Every text can be encoded and comes back unchanged.

    Args:
        texts: What to learn the merges from.
        vocab_size: Number of tokens, at least the 256 bytes and the special one. Little text may
            give fewer.

    Raises:
        UserError: `vocab_size` is below 257.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise UserError(
            f"vocab_size: {vocab_size} is too small for the {len(alphabet)} bytes and "
            f"{END_OF_TEXT}; use at least {len(alphabet) + 1}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def bos_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that begins a text. None: the tokenizer has none of its own."""
    # TransformerLens gives one that has none the end-of-text token.
    if tokenizer.bos_token == tokenizer.eos_token and not _declares(tokenizer, "bos_token"):
        return None
    return _single_id(tokenizer.bos_token_id)


def eos_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that ends a text. None: the tokenizer has none of its own."""
    # TransformerLens gives one that has none this, which it may not know; its id is that of the
    # unknown token then.
    if tokenizer.eos_token == END_OF_TEXT and not _declares(tokenizer, "eos_token"):
        return None
    return _single_id(tokenizer.eos_token_id)


def _declares(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Return True if a special token is in the tokenizer's files, or in its class."""
    return tokenizer.init_kwargs.get(name) is not None


def _single_id(token: object) -> int | None:
    assert token is None or isinstance(token, int), "lists are for generation configs alone"
    return token
