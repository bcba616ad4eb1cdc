"""Configs: frozen pydantic models, read from YAML and written to it."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, LiteralString, Self, TypeVar, cast, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from sparsify.settings.secrets import redact_secrets
from sparsify.settings.strict_yaml import parse_yaml


class UserError(ValueError):
    """Bad input from a person: a setting, a file, a name. The message says how to fix it.

    Scripts print the message alone and exit with code 2.
    """


class BaseConfig(BaseModel):
    """A frozen config. An unknown key is an error that names the nearest known one.

    True and false are no numbers, though pydantic and Python take them for 1 and 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="wrap")
    @classmethod
    def _keys_are_known_and_numbers_are_numbers(
        cls, data: Any, handler: ModelWrapValidatorHandler[Self]
    ) -> Self:
        # A validator may be handed anything; what is not a mapping is refused by pydantic.
        if not isinstance(data, Mapping):
            return handler(data)
        known = {key: value for key, value in data.items() if key in cls.model_fields}
        problems = [
            _problem("unknown_key", cls.unknown_key_message(str(key)), (), data)
            for key in data
            if key not in known
        ]
        problems += [
            _problem("bool_for_number", "Input should be a number", (key,), value)
            for key, value in known.items()
            if isinstance(value, bool) and _takes_numbers(cls.model_fields[key].annotation)
        ]
        if not problems:
            return handler(data)
        try:
            handler(known)
        except ValidationError as error:
            problems += [
                _problem(found["type"], found["msg"], found["loc"], found["input"])
                for found in error.errors()
            ]
        raise ValidationError.from_exception_data(cls.__name__, problems)

    @classmethod
    def unknown_key_message(cls, key: str) -> str:
        """What is said of a key that is no field."""
        return f"unknown key {nearest(key, cls.model_fields)}"


Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0, lt=2**63)]
"""A number of things, as torch and Python's iterators can count them."""
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What every random generator takes."""


def listed(value: object) -> object:
    """One name or path, as the original's configs may give it, as a list of one."""
    return [value] if isinstance(value, str | Path) else value


AnyConfig = TypeVar("AnyConfig", bound=BaseConfig)

TAG_MARK = "="
"""Begins the tags of the members of a union, which are no part of a setting's name."""

_MAX_SHOWN = 300


def _takes_numbers(annotation: Any) -> bool:  # whatever stands behind a field's colon
    return annotation in (int, float) or any(map(_takes_numbers, get_args(annotation)))


def _problem(
    kind: str, message: str, place: tuple[int | str, ...], given: object
) -> InitErrorDetails:
    # The message is passed as a value, as it may hold braces, which would be read as fields.
    error = PydanticCustomError(cast(LiteralString, kind), "{message}", {"message": message})
    return InitErrorDetails(type=error, loc=place, input=given)


def nearest(name: str, known: Iterable[str]) -> str:
    """`'name'`, followed by the most similar of the `known` names if one is at all similar."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"'{name}'; did you mean '{close[0]}'?" if close else f"'{name}'"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: There is no such file, or it is not a YAML mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            content = parse_yaml(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML; fix this: {error}") from None
    if not isinstance(content, dict):
        kind = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path}: holds {kind}, not 'key: value' lines")
    return content


def dump_yaml(config: BaseConfig) -> str:
    """The config as YAML that `read_yaml` and validation turn back into an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def validate_config(config_class: type[AnyConfig], content: object, source: str) -> AnyConfig:
    """A config from plain data; `source` names where it came from.

    Raises:
        UserError: The data do not fit. The message has one line per problem.
    """
    try:
        return config_class.model_validate(content)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        raise UserError("\n".join([f"{source} is not a valid config:", *problems])) from None


def _describe(problem: Mapping[str, Any]) -> str:
    parts = [str(part) for part in problem["loc"]]
    place = ".".join(part for part in parts if not part.startswith(TAG_MARK))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"  {place}: is required and has no default; set it"
    given = problem["input"]
    shown = "" if isinstance(given, Mapping | BaseModel) else f" (given: {_shown(given)})"
    return f"  {place}: {message}{shown}" if place else f"  {message}"


def _shown(value: object) -> str:
    try:
        shown = redact_secrets(repr(value))
    except ValueError:  # Python refuses to write numbers of more than 4,300 digits
        return "a number too long to be shown"
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]} ..."
