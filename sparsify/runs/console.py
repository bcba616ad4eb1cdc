"""Texts of a run for the terminal."""

import sys
from contextlib import suppress

from tqdm import tqdm


def say(text: str) -> None:
    """Print to stderr, above a progress bar if there is one.

    Training continues if nobody reads any more, or if the disk of a log is full.
    """
    with suppress(OSError):
        tqdm.write(text, file=sys.stderr)
