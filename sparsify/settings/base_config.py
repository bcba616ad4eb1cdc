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
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from sparsify.settings.files import read_text
from sparsify.settings.paths import absolute
from sparsify.settings.secrets import redact_secrets
from sparsify.settings.strict_yaml import format_yaml, parse_yaml
from sparsify.settings.terminal import can_write, escaped, printable


class UserError(ValueError):
    """Bad input from a person: a setting, a file, a name. The message says how to fix it.

    Scripts print the message alone and exit with code 2.
    """


class BaseConfig(BaseModel):
    """A frozen config. An unknown key is an error that names the nearest known one.

    True and false are not numbers, though pydantic and Python take them for 1 and 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:  # what YAML can hold
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and _takes_numbers(field.annotation):
            raise ValueError("Input should be a number")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _unknown_keys_are_explained(
        cls, data: Any, handler: ModelWrapValidatorHandler[Self]
    ) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            problems = error.errors()
        # Configs within this one have explained their own unknown keys.
        unknown = [
            _problem("unknown_key", cls.unknown_key_message(str(problem["loc"][-1])), (), data)
            for problem in problems
            if problem["type"] in _UNKNOWN_KEY
        ]
        others = [
            _problem(problem["type"], problem["msg"], problem["loc"], problem["input"])
            for problem in problems
            if problem["type"] not in _UNKNOWN_KEY
        ]
        raise ValidationError.from_exception_data(cls.__name__, unknown + others)

    def with_absolute_paths(self) -> Self:
        """Return the same settings, whose paths lead to the same files from any folder."""
        paths = {
            name: value.with_absolute_paths() if isinstance(value, BaseConfig) else absolute(value)
            for name, value in self
        }
        return self.model_copy(update=paths)

    @classmethod
    def unknown_key_message(cls, key: str) -> str:
        """Message about a key that is not a field."""
        return f"unknown key {nearest(key, cls.model_fields)}"


Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0, lt=2**63)]
"""Number of things, as torch and Python's iterators can count them."""
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Seed that every random generator takes."""


def listed(value: object) -> object:
    """Return a list of one for one name or path, as the original's configs may give it."""
    return [value] if isinstance(value, str | Path) else value


AnyConfig = TypeVar("AnyConfig", bound=BaseConfig)

TAG_MARK = "="
"""Beginning of the tags of a union's members, which are not a part of a setting's name."""

TRUST = "trust_remote_code"
"""Setting that only the command line or an argument can set, and no file: a file that could grant
it would grant it to itself."""

_MAX_SHOWN = 300

_UNKNOWN_KEY = ("extra_forbidden", "invalid_key")  # that is text, and that is not


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
    quoted = f"'{escaped(name)}'"
    return f"{quoted}; did you mean '{close[0]}'?" if close else quoted


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UserError: There is no such file, it is not a YAML mapping, or it trusts somebody's code.
    """
    try:
        content = parse_yaml(read_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid YAML; fix this: {error}") from None
    if not isinstance(content, dict):
        kind = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path}: holds {kind}, not 'key: value' lines")
    if content.get(TRUST, False) is not False:
        raise UserError(f"{path}: {not_from_a_file()}")
    return content


def not_from_a_file() -> str:
    """Return why a file that sets `TRUST` is refused, and what to do."""
    return (
        f"{TRUST}: no file can allow code to be executed; remove the line and, if you trust the "
        f"authors of the model, give --{TRUST} true on the command line ({TRUST}=True in Python)"
    )


def dump_yaml(config: BaseConfig, *, is_shown: bool = False) -> str:
    """Return YAML that `read_yaml` and validation turn back into an equal config.

    Args:
        config: Settings.
        is_shown: Whether it is for stdout. Characters that its encoding lacks, or that a terminal
            would obey, are escapes then.
    """
    content = config.model_dump(mode="json")
    text = format_yaml(content)
    if is_shown and not (can_write(text) and printable(text) == text):
        return format_yaml(content, allow_unicode=False)
    return text


def validate_config(config_class: type[AnyConfig], content: object, source: str) -> AnyConfig:
    """Return a config made from plain data; `source` names where they came from.

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
    place = ".".join(escaped(part) for part in parts if not part.startswith(TAG_MARK))
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
