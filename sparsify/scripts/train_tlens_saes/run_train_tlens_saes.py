"""Train SAEs inside a TransformerLens model: locally, end to end, or any mix.

    python sparsify/scripts/train_tlens_saes/run_train_tlens_saes.py CONFIG.yaml [--key VALUE ...]

The loop is in `sae_run.py`; here only the config is read, so that help and errors come before torch
is loaded.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsify.scripts.cli import train_script
from sparsify.scripts.train_tlens_saes.config import Config

if TYPE_CHECKING:
    from sparsify.scripts.train_tlens_saes.sae_run import SAERun


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv`, None for the process's arguments; returns the exit code."""
    return train_script(Config, _run_class, "Train SAEs inside a language model.", argv)


def _run_class() -> "type[SAERun]":
    from sparsify.scripts.train_tlens_saes.sae_run import SAERun

    return SAERun


if __name__ == "__main__":
    sys.exit(main())
