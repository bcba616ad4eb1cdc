"""Reads YAML, and refuses what PyYAML's safe loader would take or stumble over."""

from typing import Any, TextIO

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from sparsify.settings.secrets import redact_secrets

MAX_CHARACTERS = 100_000
MAX_NODES = 100_000
"""Aliases count as what they stand for: ten lines of ten aliases each could mean 10**10 values."""


def parse_yaml(file: TextIO) -> Any:  # what YAML can hold
    """The content of a YAML file, in plain data.

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
    and no path can have, and follows aliases without a limit.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._n_nodes = 0
        self._sizes: dict[str, int] = {}  # nodes below each anchor

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event, before = self.peek_event(), self._n_nodes
        self._n_nodes += 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise ComposerError(
                    None, None, f"'{event.anchor}' is a part of itself", event.start_mark
                )
            self._n_nodes += self._sizes.get(event.anchor, 1) - 1
        if self._n_nodes > MAX_NODES:
            raise ComposerError(None, None, f"more than {MAX_NODES:,} values", event.start_mark)
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent) and event.anchor is not None:
            self._sizes[event.anchor] = self._n_nodes - before
        return node

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
            if key_node.value in seen:
                raise ConstructorError(
                    None, None, f"the key '{key_node.value}' is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)
