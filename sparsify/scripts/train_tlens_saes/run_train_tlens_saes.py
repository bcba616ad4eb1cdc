"""Train SAEs inside a TransformerLens model: locally, end to end, or any mix.

    python sparsify/scripts/train_tlens_saes/run_train_tlens_saes.py CONFIG.yaml [--key VALUE ...]

The loop is in `train.py`; here only the config is read, so that help and errors come before torch
is loaded.
"""

import sys
from collections.abc import Sequence

from sparsify.scripts.cli import run_script
from sparsify.scripts.train_tlens_saes.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv`, None for the process's arguments; returns the exit code."""
    return run_script(
        Config, _train, "Train SAEs inside a language model.", argv, preflight=_preflight
    )


def _train(config: Config) -> None:
    from sparsify.scripts.train_tlens_saes.train import train_saes

    train_saes(config)


def _preflight(config: Config) -> bool:
    from sparsify.scripts.train_tlens_saes.preflight import preflight

    return preflight(config)


if __name__ == "__main__":
    sys.exit(main())
