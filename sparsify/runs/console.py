"""Texts of a run for the terminal."""

import sys
from contextlib import suppress

from tqdm import tqdm

from sparsify.settings.terminal import as_message


def say(text: str) -> None:
    """Print to stderr, above a progress bar if there is one.

    Training continues if nobody reads any more, or if the disk of a log is full.
    """
    with suppress(OSError):
        tqdm.write(as_message(text), file=sys.stderr)
