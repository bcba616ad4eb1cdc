"""Train a small language model for TransformerLens on text.

    python sparsify/scripts/train_tlens/run_train_tlens.py CONFIG.yaml [--key VALUE ...]

The run folder's `model/` holds weights, tokenizer and a card, and serves as `tlens_model_path` of
the other scripts. The bundled model was made by `tiny_python.yaml`. The loop is in `lm_run.py`;
here only the config is read, so that help and errors come before torch is loaded.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsify.scripts.cli import train_script
from sparsify.scripts.train_tlens.config import Config

if TYPE_CHECKING:
    from sparsify.scripts.train_tlens.lm_run import LanguageModelRun


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv`, None for the process's arguments; returns the exit code."""
    return train_script(Config, _run_class, "Train a small language model on text.", argv)


def _run_class() -> "type[LanguageModelRun]":
    from sparsify.scripts.train_tlens.lm_run import LanguageModelRun

    return LanguageModelRun


if __name__ == "__main__":
    sys.exit(main())
