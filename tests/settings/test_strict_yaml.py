import io
import time

import pytest
import yaml

from sparsify.settings.strict_yaml import MAX_NODES, parse_yaml


def parse(text: str) -> object:
    return parse_yaml(io.StringIO(text))


def test_aliases_and_merges_may_be_used():
    text = "a: &a {x: 1, y: [2]}\nb: {<<: *a, x: 3}\nc: [*a, *a]\n"
    a = {"x": 1, "y": [2]}
    assert parse(text) == {"a": a, "b": {"x": 3, "y": [2]}, "c": [a, a]}


def test_aliases_count_as_what_they_stand_for():
    # A list of m ones is m + 1 values, and one of n aliases to it n * (m + 1) + 1.
    def text(n: int, m: int) -> str:
        return f"a: &a [{'1, ' * m}]\nb: [{'*a, ' * n}]\n"

    n = MAX_NODES // 302  # 331, so 1 + 2 + 301 + 331 * 301 + 1 = 99,936 with the mapping and keys
    assert parse(text(n, 300)) == {"a": [1] * 300, "b": [[1] * 300] * n}
    with pytest.raises(yaml.YAMLError, match="more than 100,000 values"):
        parse(text(n + 2, 300))


def test_a_bomb_is_refused_at_once():
    text = "a0: &a0 x\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
    )
    begin = time.monotonic()
    with pytest.raises(yaml.YAMLError, match="more than 100,000 values"):
        parse(text)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("text", ["&a [*a]", "a: &a {b: *a}", "a: &a\n  - b: [*a]\n"])
def test_what_is_a_part_of_itself_is_refused(text: str):
    with pytest.raises(yaml.YAMLError, match="'a' is a part of itself"):
        parse(text)
