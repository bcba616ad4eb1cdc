from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from sparsify.scripts.cli import training_scripts
from sparsify.settings.base_config import read_yaml, validate_config
from sparsify.settings.strict_yaml import format_yaml, parse_yaml
from sparsify.sweeps.sweep import SweepConfig

PACKAGE = Path(__file__).parents[2] / "sparsify"
# What finetune.yaml lacks, its runs are given by a script.
PACKAGED = sorted(path for path in PACKAGE.rglob("*.yaml") if path.name != "finetune.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: &b 2\n", 2),
        ("a: [1]\nb: 2\nc: *a\n", 3),
        ("a: *.py\n", 1),
        ("a:\n  b: 1\n  <<: {c: 2}\n", 3),
        ("&a [*a]", 1),
    ],
)
def test_references_are_refused_with_their_line_and_the_remedy(text: str, line: int):
    with pytest.raises(yaml.YAMLError) as error:
        parse_yaml(text)
    message = str(error.value)
    assert "anchors (&), aliases (*) and merge keys (<<) are not supported; write the " in message
    assert f"line {line}, " in message


def test_text_like_a_reference_is_taken_in_quotes():
    text = "a: '*x'\nb: \"&y\"\nc: {'<<': 1}\nd: R&D\ne: 2*3\n"
    assert parse_yaml(text) == {"a": "*x", "b": "&y", "c": {"<<": 1}, "d": "R&D", "e": "2*3"}


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "x: {a: 1, a: 1}\n"])
def test_a_key_that_is_given_twice_is_refused(text: str):
    with pytest.raises(yaml.YAMLError, match="the key 'a' is given twice"):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # Numbers, words
        ("7", 7),
        ("-0", 0),
        ("+12", 12),
        ("0.5", 0.5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1.5e-3", 0.0015),
        ("1.5e3", 1500.0),
        ("-.inf", float("-inf")),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        # Text, though YAML 1.1 has another meaning for it, or Python's readers might
        ("0100", "0100"),
        ("-010", "-010"),
        ("0x10", "0x10"),
        ("0o17", "0o17"),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1e-3", "1e-3"),
        ("12e5", "12e5"),
        ("1:30", "1:30"),
        ("1:30:00", "1:30:00"),
        ("1:30.5", "1:30.5"),
        ("1:30:" + 5000 * "0", "1:30:" + 5000 * "0"),
        ("2024-13-01", "2024-13-01"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("On", "On"),
        ("y", "y"),
        ("=", "="),
        ("١", "١"),
    ],
)
def test_only_plain_numbers_and_words_are_more_than_text(text: str, value: object):
    found = parse_yaml(f"a: {text}\n")["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *("!!binary AGE=", "!!int 0100", "!!float 1:30", "!!timestamp 2024-01-01", "!!set {x}"),
        *("!own x", "!!merge x", "!<tag:yaml.org,2002:int> 3", "!x", "!!python/name:os.system"),
    ],
)
@pytest.mark.parametrize("place", ["a: {}", "{}: a", "[{}]", "a: {{b: [{}]}}"])
def test_tags_are_refused(text: str, place: str):
    with pytest.raises(yaml.YAMLError, match=r"tags \(!\) are not supported; write the value"):
        parse_yaml(place.format(text))


def test_a_number_of_more_digits_than_python_reads_is_refused():
    with pytest.raises(yaml.YAMLError, match="4300 digits"):
        parse_yaml(f"a: {5000 * '1'}\n")


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.from_regex(
    r"[-+.0-9eE_:xinfaINFA~<=]{1,8}", fullmatch=True
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(TEXTS, parts, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=3), st.booleans())
@example(dict.fromkeys(["1.5e3", "-.5", "+.5", "1.e5", "7", "0100", "no", "\x85", ""], 1), True)
def test_what_is_written_is_read_back(content: dict[str, Any], allow_unicode: bool):
    text = format_yaml(content, allow_unicode=allow_unicode)
    # As text, which tells 1 from 1.0 and true.
    assert repr(parse_yaml(text)) == repr(content)


@pytest.mark.parametrize("text", ["1.5e3", "-.5", "0100", "no", "2024-01-01", "1:30", "<<", "~"])
def test_text_that_any_reader_may_take_for_more_is_written_in_quotes(text: str):
    assert format_yaml({"a": text}) == f"a: '{text}'\n"


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.stem)
def test_packaged_files_mean_what_plain_yaml_says(path: Path):
    command = "train-lm" if path.parent.name == "train_tlens" else "train-saes"
    config: Any = training_scripts()[command].config  # whose class depends on the script
    if path.parent.name == "sweeps":
        config = SweepConfig
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert validate_config(config, read_yaml(path), "") == config.model_validate(plain)
