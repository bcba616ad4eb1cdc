"""Paths in settings: `~` is the home folder, and what a run records leads there from anywhere."""

import argparse
import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field


def with_home(path: str) -> str:
    """Return `path` with the home folder in place of a `~` at its beginning.

    Raises:
        ValueError: It is that of a user whom the system does not know.
    """
    found = os.path.expanduser(path)
    if found == path and path.startswith("~"):
        user = path.split("/")[0]
        raise ValueError(
            f"'{path}': there is no home folder '{user}'; write the path out, or ./{path} for a "
            "file that is called so"
        )
    return found


def user_path(text: str) -> Path:
    """Return the path that an argument of a command line means.

    Raises:
        argparse.ArgumentTypeError: It begins with a home folder that is not there.
    """
    try:
        return Path(with_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _path_with_home(path: Path) -> Path:
    return Path(with_home(str(path)))


UserPath = Annotated[Path, AfterValidator(_path_with_home)]
"""Path as a person writes it."""
NameOrPath = Annotated[str, Field(min_length=1), AfterValidator(with_home)]
"""Name of something, or the path of a local one."""


def absolute(value: object) -> object:
    """Return `value`, with paths that are absolute if it is one or a list of them."""
    if isinstance(value, Path):
        return value.absolute()
    return [absolute(part) for part in value] if isinstance(value, list) else value


def absolute_name(name: str) -> str:
    """Return `name`, made absolute if it is the path of something that is there."""
    return os.path.abspath(name) if os.path.exists(name) else name
