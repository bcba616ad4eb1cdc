"""YAML that means what it says: what PyYAML's safe loader takes or stumbles over is refused.

Only these words and plain decimal numbers are more than text: `true`, `false`, `null`, `~`, `7`,
`-0.5`, `1.5e-3`, `.inf`, `.nan`. All else that YAML 1.1 reads as a number, a date or a truth
(`0100`, `0x10`, `1:30`, `1_000`, `2024-01-01`, `no`) is the text that was typed. A setting that
takes a number reads such a text as it reads an option of the command line.
"""

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from sparsify.settings.secrets import redact_secrets

MAX_CHARACTERS = 100_000

_REFERENCE = (
    "anchors (&), aliases (*) and merge keys (<<) are not supported; write the values out, or put "
    "text that begins so in quotes"
)
_TAG = "tags (!) are not supported; write the value alone, or put text that begins so in quotes"

_MERGE = "tag:yaml.org,2002:merge"
_WORDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|"
        r"\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
"""What is more than text: its pattern, and the characters that it begins with."""


def parse_yaml(text: str) -> Any:  # what YAML can hold
    """Return the content of a YAML text, in plain data.

    Raises:
        yaml.YAMLError: It is not valid YAML, or not what a person would write.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"more than {MAX_CHARACTERS:,} characters")
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        if redact_secrets(text) != text:
            # The lines that are shown may hold a part of a token, which cannot be told.
            for mark in filter(None, (error.context_mark, error.problem_mark)):
                mark.buffer = None
        raise
    except RecursionError:
        raise yaml.YAMLError("brackets or lines are nested too deep") from None
    except ValueError as error:  # of Python: too long a number
        raise yaml.YAMLError(str(error)) from None


def format_yaml(content: object, *, allow_unicode: bool = True) -> str:
    """Return YAML that `parse_yaml` turns back into equal content, in plain data.

    Args:
        content: Plain data, without NUL characters and halves of a character.
        allow_unicode: Whether characters that are not ASCII are written as they are.
    """
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses what it would take.

    By itself it keeps the last of equal keys and drops the others, reads characters that no name
    and no path can have, makes values that tags ask for, and follows aliases, so that a few lines
    can mean billions of values.
    """

    yaml_implicit_resolvers = {}

    def fetch_anchor(self) -> None:
        raise ConstructorError(None, None, _REFERENCE, self.get_mark())

    fetch_alias = fetch_anchor

    def fetch_tag(self) -> None:
        raise ConstructorError(None, None, _TAG, self.get_mark())

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise ConstructorError(
                None, None, "a character that no name and no path can have", node.start_mark
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.tag == _MERGE:
                raise ConstructorError(None, None, _REFERENCE, key_node.start_mark)
            if key_node.value in seen:
                raise ConstructorError(
                    None, None, f"the key '{key_node.value}' is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes all text that it or `_StrictLoader` takes for more."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Else some signs of a line's end are written as they are, and read as another one.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _kind, (_pattern, _first) in _WORDS.items():
    for _class in (_StrictLoader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first
        )
