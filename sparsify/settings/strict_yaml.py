"""YAML that means what it says: what PyYAML's safe loader takes or stumbles over is refused."""

from typing import Any, TextIO

import yaml
from yaml.constructor import ConstructorError

from sparsify.settings.secrets import redact_secrets

MAX_CHARACTERS = 100_000

_REFERENCE = (
    "anchors (&), aliases (*) and merge keys (<<) are not supported; write the values out, or put "
    "text that begins so in quotes"
)


def parse_yaml(file: TextIO) -> Any:  # what YAML can hold
    """Return the content of a YAML file, in plain data.

    Raises:
        yaml.YAMLError: The file is not valid YAML, or not what a person would write.
    """
    try:
        text = file.read(MAX_CHARACTERS + 1)
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
    except ValueError as error:  # of Python: no UTF-8, no such date, too long a number
        raise yaml.YAMLError(str(error)) from None
    except (LookupError, AttributeError):  # of PyYAML, which trusts tags: `!!bool maybe`
        raise yaml.YAMLError("a value is not of the kind that its tag says") from None


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses what it would take.

    By itself it keeps the last of equal keys and drops the others, reads characters that no name
    and no path can have, and follows aliases, so that a few lines can mean billions of values.
    """

    def fetch_anchor(self) -> None:
        raise ConstructorError(None, None, _REFERENCE, self.get_mark())

    fetch_alias = fetch_anchor

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
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise ConstructorError(None, None, _REFERENCE, key_node.start_mark)
            if key_node.value in seen:
                raise ConstructorError(
                    None, None, f"the key '{key_node.value}' is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)
