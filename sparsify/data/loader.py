"""Batches of token sequences, made in a worker process while the model trains."""

import copy
import itertools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, Int32
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from sparsify.data.config import DataConfig
from sparsify.data.documents import TextFiles
from sparsify.data.sources import open_documents
from sparsify.data.tokens import IdPacker, Pack, TextPacker, TokenSequences
from sparsify.settings.base_config import UserError

Row = Int32[np.ndarray, " pos"]


def build_loader(
    config: DataConfig,
    *,
    batch_size: int,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    d_vocab: int | None = None,
    model_n_ctx: int | None = None,
    num_workers: Literal[0, 1] = 1,
) -> "TokenLoader":
    """Batches of `config`'s data, shape `batch pos`, as int64.

    The last batch is left out if it is short. An iteration that starts anew gives the same batches
    again; `state_dict` and `load_state_dict` let it go on in another process, exactly.

    Args:
        config: The data.
        batch_size: Sequences in a batch.
        tokenizer: A fast tokenizer. Not used for tokenized data, where it may be None.
        seed: Of the order, if the config has none.
        d_vocab: Number of token ids that the model knows. None: not checked.
        model_n_ctx: Longest sequence that the model takes. None: not checked.
        num_workers: 1 reads and tokenizes in a process beside the caller's, and a block ahead.

    Raises:
        UserError: The data cannot be read or do not suit the model. What shows only in later rows,
            or, but for a short text, that there is not even one batch, is raised by the iteration.
    """
    if model_n_ctx is not None and config.n_ctx > model_n_ctx:
        raise UserError(
            f"n_ctx: {config.n_ctx} is beyond the model's context of {model_n_ctx}; "
            f"use at most {model_n_ctx}"
        )
    pack = _packer(config, tokenizer, d_vocab)
    if num_workers > 0:
        # The worker is a fork, and a tokenizer with threads must not be forked. One that had run
        # before would say so on every start of a worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    documents = open_documents(config)
    sequences = _ReportingSequences(
        documents,
        pack,
        n_epochs=config.n_epochs,
        block_samples=config.shuffle_block_samples,
        seed=seed if config.seed is None else config.seed,
        name=config.dataset_name,
        min_samples=batch_size,
    )
    if isinstance(documents, TextFiles) and documents.is_small():
        _check_first_batch(sequences, batch_size)
    return TokenLoader(sequences, batch_size, num_workers)


class TokenLoader:
    """Batches of sequences through torchdata's `StatefulDataLoader`.

    Beyond that, a `UserError` of the worker is raised as it was, without the worker's traceback in
    its message, and a loader that was saved at its end is at its end when it is resumed.
    """

    def __init__(
        self, sequences: "_ReportingSequences", batch_size: int, num_workers: Literal[0, 1]
    ) -> None:
        self._sequences = sequences
        self._has_ended = False
        self._is_resumed_at_end = False
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            self._loader: StatefulDataLoader[Row | UserError] = StatefulDataLoader(
                sequences,
                batch_size=batch_size,
                drop_last=True,
                collate_fn=_collate,
                num_workers=num_workers,
                # A worker of a fork server, Python 3.14's default, would outlive a killed process.
                multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
                worker_init_fn=_leave_signals_to_the_main_process,
                generator=torch.Generator(),  # or each iteration would draw from the global one
            )

    def __iter__(self) -> Iterator[Int[Tensor, "batch pos"]]:
        """The batches; see `build_loader`."""
        is_over, self._is_resumed_at_end = self._is_resumed_at_end, False
        if is_over:
            return
        self._has_ended = False
        for batch in self._loader:
            if isinstance(batch, UserError):
                try:
                    raise batch
                finally:
                    del batch  # it holds this frame; a cycle would delay the end of the worker
            yield batch
        self._has_ended = True

    def samples_by_chunk(self) -> Iterator[int]:
        """How many samples each chunk of one epoch gives; they are read for it, in any process."""
        return self._sequences.samples_by_chunk()

    def close(self) -> None:
        """End the worker at once; the loader is of no use then.

        An iteration that was left would end its worker only when it is collected as garbage, after
        its way to reach the worker, and wait for it in vain for 5 seconds.
        """
        vars(self).pop("_loader", None)

    def state_dict(self) -> dict[str, Any]:  # torchdata's state is untyped
        """Where the iteration stands, in data that `torch.load(weights_only=True)` reads."""
        return {"loader": self._loader.state_dict(), "has_ended": self._has_ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where `state_dict` was called."""
        self._has_ended = self._is_resumed_at_end = state["has_ended"]
        self._loader.load_state_dict({} if self._has_ended else state["loader"])


class _ReportingSequences(TokenSequences):
    """Gives a `UserError` out in place of sequences.

    Raised in a worker, its message would reach the user inside a traceback.
    """

    def __iter__(self) -> Iterator[Any]:  # what the base class yields, or the error
        try:
            yield from super().__iter__()
        except UserError as error:
            yield from itertools.repeat(error)  # fills the batch, which would be left out if short


def _check_first_batch(sequences: _ReportingSequences, batch_size: int) -> None:
    # A copy, since an iteration moves the place that a state has before the loader's first one.
    batch = _collate(list(itertools.islice(copy.copy(sequences), batch_size)))
    if isinstance(batch, UserError):
        raise batch


def _leave_signals_to_the_main_process(worker: int) -> None:
    # Ctrl-C, or a signal to the whole process group, would end the worker, but the main process may
    # want more batches before it stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    # The fork took over what the main process does on SIGTERM, by which it ends the worker.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):
        # Some schedulers send it to every process.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_if_the_main_process_says_so, daemon=True).start()


def _end_if_the_main_process_says_so() -> None:
    main = os.getppid()
    # Once that is gone, anybody may end the worker.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main and os.getppid() == main:
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)


def _collate(rows: list[Row | UserError]) -> Int[Tensor, "batch pos"] | UserError:
    sequences: list[Row] = []
    for row in rows:
        if isinstance(row, UserError):
            return row
        sequences.append(row)
    return torch.from_numpy(np.stack(sequences).astype(np.int64))


def _packer(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, d_vocab: int | None
) -> Pack:
    if config.is_tokenized:
        return IdPacker(config.n_ctx, config.dataset_name, d_vocab)
    tokenizer = check_tokenizer(config, tokenizer, d_vocab)
    return TextPacker(
        tokenizer,
        config.n_ctx,
        _single_id(tokenizer.eos_token_id),
        _single_id(tokenizer.bos_token_id) if config.add_bos_token else None,
    )


def check_tokenizer(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, d_vocab: int | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a text, if it suits the model and the config.

    Args:
        config: The text.
        tokenizer: What would make tokens of it. None: there is none, which is an error.
        d_vocab: Number of token ids that the model knows. None: not checked.

    Raises:
        UserError: It gives ids that the model does not know, or lacks a special token.
    """
    if tokenizer is None:
        raise UserError("tokenizer_name: text needs a tokenizer and the model has none; name one")
    name = config.tokenizer_name or tokenizer.name_or_path or "the model's tokenizer"
    largest_id = max(tokenizer.get_vocab().values())
    if d_vocab is not None and largest_id >= d_vocab:
        raise UserError(
            f"tokenizer_name: '{name}' has token ids up to {largest_id}, but the model's "
            f"vocabulary has {d_vocab} ids from 0; use the tokenizer the model was trained with"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer_name: '{name}' has no end-of-text token to put between documents; "
            f"set its eos_token, or name another tokenizer"
        )
    if config.add_bos_token and tokenizer.bos_token_id is None:
        raise UserError(
            f"add_bos_token: '{name}' has no BOS token; set add_bos_token: false, or name another "
            f"tokenizer"
        )
    return tokenizer


def _single_id(token_id: object) -> int:
    assert isinstance(token_id, int), "transformers allows lists only in generation configs"
    return token_id
