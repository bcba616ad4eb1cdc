"""Keys and names of accounts from a `.env` file, and nothing else that such a file may hold.

A folder that comes from elsewhere may have a `.env`. Other variables could send a key to another
server, or have Python run other code.
"""

import os
from io import StringIO
from pathlib import Path

from dotenv import dotenv_values, find_dotenv

from sparsify.settings.files import read_text
from sparsify.settings.terminal import tell

VARIABLES = ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_MODE", "HF_TOKEN")
"""Variables that are read, which `.env.example` documents."""


def read_dotenv() -> None:
    """Set the variables that the `.env` of this folder or one above holds; those that are set stay.

    Others are ignored, with a warning, and so is a file that is not readable text.
    """
    path = find_dotenv(usecwd=True)
    if not path:
        return
    try:
        text = _text_of(Path(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        tell(f"warning: {path}: is ignored, as it cannot be read ({reason}); fix or remove it")
        return
    found = dotenv_values(stream=StringIO(text), interpolate=False)
    for name in VARIABLES:
        if (value := found.get(name)) is not None:
            os.environ.setdefault(name, value)
    if ignored := ", ".join(repr(name) for name in found if name not in VARIABLES):
        tell(
            f"warning: {path}: {ignored} ignored, as only {', '.join(VARIABLES)} are read from it; "
            "set other variables in the environment"
        )


def _text_of(path: Path) -> str:
    """Return the text of a `.env`.

    Raises:
        OSError: It cannot be read, or is too large.
        ValueError: It is not text that can be a variable's.
    """
    text = read_text(path)
    if "\0" in text:
        raise ValueError("it holds a NUL character")
    return text
