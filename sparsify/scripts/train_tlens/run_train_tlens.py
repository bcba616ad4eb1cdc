"""Train a small language model for TransformerLens on text.

    python sparsify/scripts/train_tlens/run_train_tlens.py CONFIG.yaml [--key VALUE ...]

The run folder's `model/` holds weights, tokenizer and a card, and serves as `tlens_model_path` of
the other scripts. The bundled model was made by `tiny_python.yaml`. The loop is in `train.py`; here
only the config is read, so that help and errors come before torch is loaded.
"""

import sys
from collections.abc import Sequence

from sparsify.scripts.cli import run_script
from sparsify.scripts.train_tlens.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv`, None for the process's arguments; returns the exit code."""
    return run_script(
        Config, _train, "Train a small language model on text.", argv, preflight=_preflight
    )


def _train(config: Config) -> None:
    from sparsify.scripts.train_tlens.train import train_language_model

    train_language_model(config)


def _preflight(config: Config) -> bool:
    from sparsify.scripts.train_tlens.preflight import preflight

    return preflight(config)


if __name__ == "__main__":
    sys.exit(main())
