"""What a run says on the terminal."""

import sys
from contextlib import suppress

from tqdm import tqdm


def say(text: str) -> None:
    """Print to stderr, above a progress bar if there is one.

    Whoever watches may be gone, or the disk of a log be full: training continues.
    """
    with suppress(OSError):
        tqdm.write(text, file=sys.stderr)
