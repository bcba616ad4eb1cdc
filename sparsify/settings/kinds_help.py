"""Help for settings that differ between the kinds of a union."""

import argparse
from typing import get_args

from pydantic import BaseModel, Tag


def explain_kinds(parser: argparse.ArgumentParser, config_class: type[BaseModel]) -> None:
    """Have options of a union's members say which of its kinds they belong to.

    A union is a field whose members are tagged and have a field `kind` with their name.
    """
    actions = {
        action.option_strings[0]: action for action in parser._actions if action.option_strings
    }
    for name, field in config_class.model_fields.items():
        kinds = {
            parts[0].model_fields["kind"].default: parts[0]
            for parts in map(get_args, get_args(field.annotation))
            if any(isinstance(part, Tag) for part in parts)
        }
        for option, action in actions.items():
            prefix, _, setting = option.rpartition(".")
            if prefix != f"--{name}" or not kinds:
                continue
            owners = [kind for kind, member in kinds.items() if setting in member.model_fields]
            if setting == "kind":
                action.metavar = f"{{{','.join(kinds)}}}"
                action.help = f"One of these kinds. {action.help}"
            elif len(owners) < len(kinds):
                said = (action.help or "").replace(" (required)", "")
                action.help = f"Kind {', '.join(owners)}: {said}"
