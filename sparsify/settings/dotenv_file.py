"""Keys and names of accounts from a `.env` file, and nothing else that such a file may hold.

A folder that comes from elsewhere may have a `.env`. Other variables could send a key to another
server, or have Python run other code.
"""

import os

from dotenv import dotenv_values, find_dotenv

from sparsify.settings.terminal import tell

VARIABLES = ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_MODE", "HF_TOKEN")
"""Variables that are read, which `.env.example` documents."""


def read_dotenv() -> None:
    """Set the variables that the `.env` of this folder or one above holds; those that are set stay.

    Others are ignored, with a warning.
    """
    path = find_dotenv(usecwd=True)
    found = dotenv_values(path, interpolate=False) if path else {}
    for name in VARIABLES:
        if (value := found.get(name)) is not None:
            os.environ.setdefault(name, value)
    if ignored := ", ".join(repr(name) for name in found if name not in VARIABLES):
        tell(
            f"warning: {path}: {ignored} ignored, as only {', '.join(VARIABLES)} are read from it; "
            "set other variables in the environment"
        )
