"""The built-in text: the standard library of the Python that runs this.

A file belongs to a split by a hash of its path, so that it stays there on every machine and no
validation file is ever trained on. The library repeats itself, though: 8 % of the words of the
validation split lie in runs of 30 words or more that the training split has, too (copies of a
grammar, tables of encodings), and one of its files is the same as a training file (Python 3.11).
"""

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Literal

_OTHER_PACKAGES = {"site-packages", "dist-packages", "__pycache__"}
_VALIDATION_PERCENT = 5


def iter_files(split: Literal["train", "validation"]) -> list[Path]:
    """Return the source files of a split, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _OTHER_PACKAGES]
        below = Path(folder).relative_to(root)
        names += [(below / name).as_posix() for name in files if name.endswith(".py")]
    return [root / name for name in sorted(names) if split_of(name) == split]


def split_of(relative_path: str) -> Literal["train", "validation"]:
    """Return the split of a file, from its path in the library's folder, with forward slashes."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    is_validation = int.from_bytes(digest[:8], "big") % 100 < _VALIDATION_PERCENT
    return "validation" if is_validation else "train"
