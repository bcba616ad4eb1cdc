import io

import pytest
import yaml

from sparsify.settings.strict_yaml import parse_yaml


def parse(text: str) -> object:
    return parse_yaml(io.StringIO(text))


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
        parse(text)
    message = str(error.value)
    assert "anchors (&), aliases (*) and merge keys (<<) are not supported; write the " in message
    assert f"line {line}, " in message


def test_text_like_a_reference_is_taken_in_quotes():
    text = "a: '*x'\nb: \"&y\"\nc: {'<<': 1}\nd: R&D\ne: 2*3\n"
    assert parse(text) == {"a": "*x", "b": "&y", "c": {"<<": 1}, "d": "R&D", "e": "2*3"}


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "x: {a: 1, a: 1}\n"])
def test_a_key_that_is_given_twice_is_refused(text: str):
    with pytest.raises(yaml.YAMLError, match="the key 'a' is given twice"):
        parse(text)
