from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsify.settings.base_config import UserError
from sparsify.tlens.tokenizers import (
    END_OF_TEXT,
    bos_token,
    eos_token,
    load_tokenizer,
    train_tokenizer,
)


@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn x  # ünï\r\n", "a , b .\n\n\n", "\x00 \N{SNAKE}"]
)
def test_encoded_text_comes_back_unchanged(text: str, tokenizer: PreTrainedTokenizerFast):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_trained_tokenizer_begins_and_ends_texts_with_token_zero(
    tokenizer: PreTrainedTokenizerFast,
):
    assert len(tokenizer) == 300
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.convert_ids_to_tokens(0) == END_OF_TEXT


def test_saved_tokenizer_loads_and_encodes_alike(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]
):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert loaded.eos_token_id == 0
    assert loaded.decode(loaded("a , b")["input_ids"]) == "a , b"


def test_too_small_vocabulary_is_rejected():
    with pytest.raises(UserError, match=r"vocab_size: 256 is too small .* use at least 257"):
        train_tokenizer(["text"], vocab_size=256)


def test_missing_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"tokenizer_name: '.*' cannot be loaded: .*; name tiny-pyt"
    ):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("is_link", [False, True])
def test_a_name_of_the_hub_means_no_folder_that_is_here(
    is_link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer("tiny-python")
    tokenizer.save_pretrained(tmp_path / ("elsewhere" if is_link else "gpt2"))
    if is_link:
        Path("gpt2").symlink_to("elsewhere")
    with pytest.raises(UserError) as error:
        load_tokenizer("gpt2")
    assert str(error.value) == (
        f"tokenizer_name: 'gpt2' is also a file or folder in '{tmp_path}', which would be loaded "
        "in place of the tokenizer of that name; write ./gpt2 if the folder is meant, else rename "
        "it or work in another folder"
    )
    for folder in ("./gpt2", Path("gpt2")):
        assert len(load_tokenizer(folder)) == len(tokenizer)


def test_the_bundled_tokenizer_is_not_a_folder_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("tiny-python").mkdir()
    assert len(load_tokenizer("tiny-python")) == 4096


def through_transformer_lens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as TransformerLens leaves it, which gives it the tokens that it lacks."""
    from transformer_lens.utilities.tokenize_utils import get_tokenizer_with_bos

    changed = get_tokenizer_with_bos(tokenizer)
    changed.eos_token = changed.eos_token or END_OF_TEXT
    changed.bos_token = changed.bos_token or changed.eos_token
    return changed


@pytest.mark.model
@pytest.mark.parametrize(
    ("own", "bos", "eos"),
    [
        ({"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}, 0, 0),
        ({"eos_token": END_OF_TEXT}, None, 0),
        ({"bos_token": "a", "eos_token": "b"}, 65, 66),
        ({"bos_token": "a"}, 65, None),
        ({"unk_token": "a"}, None, None),
        ({}, None, None),
    ],
)
def test_special_tokens_are_those_of_the_tokenizers_own_files(
    own: dict[str, str],
    bos: int | None,
    eos: int | None,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
):
    backend = tokenizer.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, **own).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert (bos_token(loaded), eos_token(loaded)) == (bos, eos)
    changed = through_transformer_lens(load_tokenizer(str(tmp_path)))
    assert changed.bos_token_id is not None
    assert (bos_token(changed), eos_token(changed)) == (bos, eos)
