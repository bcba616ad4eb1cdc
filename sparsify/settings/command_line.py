"""The command line of a config: a YAML file, and an option for each of its fields.

`load_config` serves all scripts: `CONFIG.yaml --loss.sparsity.coeff 0.5 --lr 1e-3`, `--help`, and
`--print-config`. Nothing here imports torch, so that these, and a message about a wrong setting,
come at once.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from pydantic import create_model

from sparsify.settings.base_config import (
    AnyConfig,
    BaseConfig,
    UserError,
    dump_yaml,
    nearest,
    read_yaml,
    validate_config,
)
from sparsify.settings.kinds_help import explain_kinds
from sparsify.settings.paths import user_path
from sparsify.settings.secrets import redact_secrets

Settings = dict[str, Any]
"""What YAML or the command line says, in plain data."""
Origin = Callable[[Path | None, Settings, Settings], tuple[Settings, Path]]
"""Returns all settings, and the file of most, for the file that is named, if any, its settings, and
those of options."""


def named_file(path: Path | None, content: Settings, options: Settings) -> tuple[Settings, Path]:
    """Return the settings of the file that is named on the command line, and of the options.

    Raises:
        UserError: No file is named.
    """
    if path is None:
        raise UserError("the following arguments are required: CONFIG.yaml; see --help")
    return merged(content, options), path


def load_config(
    config_class: type[AnyConfig],
    argv: Sequence[str],
    description: str,
    flags: Mapping[str, str] = MappingProxyType({}),
    alone: Mapping[str, str] = MappingProxyType({}),
    origin: Origin = named_file,
) -> AnyConfig:
    """Return the config of a script from its command line.

    Args:
        config_class: Class of the config.
        argv: Arguments without the program's name: a YAML file and overrides of its fields.
        description: First line of `--help`.
        flags: Further options that `argv` may hold, which take no value, and what `--help` says of
            them. They are not a part of the config: what they do is up to the caller.
        alone: By field, the value of its option where that stands alone.
        origin: Finds the settings that the options change: by default, in the file.

    Raises:
        UserError: The file or an override is not valid.
        SystemExit: `--help` or `--print-config` has been answered.
    """
    parser = Parser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "config",
        metavar="CONFIG.yaml",
        nargs="?",
        type=user_path,
        help="settings of the run; it comes before the options",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the complete config and exit"
    )
    for flag, text in flags.items():
        parser.add_argument(flag, action="store_true", help=text)
    overrides = _add_field_options(parser, config_class, alone)
    namespace, unknown = parser.parse_known_args(list(argv))
    # What may be missing is taken as missing where an option comes first.
    if namespace.config is None and unknown and not unknown[0].startswith("-"):
        namespace.config = Path(unknown.pop(0))
    if unknown:
        options = [option for option in parser.option_names() if option.startswith("--")]
        raise UserError(f"unknown option {nearest(unknown[0].split('=')[0], options)}")
    named = {} if namespace.config is None else read_yaml(namespace.config)
    content, source = origin(namespace.config, named, overrides(namespace))
    config = validate_config(config_class, content, str(source))
    if secret := ", ".join(_settings_with_secrets(config.model_dump(mode="json"))):
        raise UserError(
            f"{secret}: holds an access token, which would be saved with the run; remove it, and "
            "set WANDB_API_KEY or HF_TOKEN in .env instead"
        )
    if namespace.print_config:
        print(dump_yaml(config, is_shown=True), end="", flush=True)
        raise SystemExit(0)
    return config


def program_name() -> str:
    """Return what was typed to start the program, for `usage:`; with the command of `sparsify`."""
    name = Path(sys.argv[0]).name
    return " ".join([name, *sys.argv[1:2]]) if Path(name).stem == "sparsify" else name


def _settings_with_secrets(value: Any, name: str = "") -> Iterator[str]:  # what YAML can hold
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _settings_with_secrets(part, f"{name}.{key}".strip("."))
    elif redact_secrets(str(value)) != str(value):
        yield name


class Parser(argparse.ArgumentParser):
    """argparse, with errors raised as `UserError`, and options only by their full name.

    argparse itself prints what was typed as it is, and ends the process.
    """

    def __init__(self, **kwargs: Any) -> None:  # what argparse takes
        super().__init__(**{"prog": program_name(), "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise UserError(f"{message}; see --help")

    def option_names(self) -> list[str]:
        """Return all options."""
        return list(self._option_string_actions)


def _add_field_options(
    parser: argparse.ArgumentParser, config_class: type[BaseConfig], alone: Mapping[str, str]
) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """Add an option for every field; returns what reads the options that were given."""
    from pydantic_settings import (
        BaseSettings,
        CliSettingsSource,
        SettingsConfigDict,
        SettingsError,
    )

    class Options(BaseSettings):
        model_config = SettingsConfigDict(extra="forbid", cli_parse_none_str="null")

    # Of two bases, create_model declares the first, and pydantic-settings wants the second.
    settings_class: Any = create_model("Settings", __base__=(config_class, Options))
    source = CliSettingsSource(
        settings_class,
        root_parser=parser,
        add_argument_method=partial(_add_option, alone),
        cli_exit_on_error=False,
        cli_parse_none_str="null",
        cli_hide_none_type=False,
        cli_avoid_json=True,
    )

    explain_kinds(parser, config_class)

    def read(namespace: argparse.Namespace) -> dict[str, Any]:
        try:
            return _with_null_lists(source(parsed_args=namespace)())
        except SettingsError as error:
            raise UserError(f"an option has no value of its kind ({error}); see --help") from None

    return read


def _add_option(
    alone: Mapping[str, str],
    group: argparse._ActionsContainer,
    option: str,
    **kwargs: Any,  # of argparse
) -> argparse.Action:
    if kwargs.get("action") == "append":  # a list
        of_one = re.sub(r"list\[(.*?)\]", r"\1", kwargs["metavar"])
        example = f"{kwargs.get('help', '')}\nSeveral: {option} A B".lstrip()
        kwargs |= {"action": "extend", "nargs": "+", "metavar": of_one, "help": example}
    elif (value := alone.get(option.removeprefix("--"))) is not None:
        kwargs |= {"nargs": "?", "const": value}
    return group.add_argument(option, **kwargs)


def _with_null_lists(overrides: dict[str, Any]) -> dict[str, Any]:
    # pydantic-settings reads null as the only element of a list, where the field may be a list.
    return {
        key: _with_null_lists(value)
        if isinstance(value, dict)
        else (None if value == [None] else value)
        for key, value in overrides.items()
    }


def merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in plain data, with some of them, also those inside others, replaced."""
    found = dict(base)
    for key, value in overrides.items():
        old = found.get(key)
        found[key] = (
            merged(old, value) if isinstance(value, Mapping) and isinstance(old, dict) else value
        )
    return found
