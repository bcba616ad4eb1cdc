"""Text of a run: batches for its model, which of their tokens count, and how far they reach."""

import time
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsify.data.config import DataConfig
from sparsify.data.loader import TokenLoader, build_loader, check_tokenizer
from sparsify.evaluation.batches import Kept
from sparsify.losses.kept import kept_mask
from sparsify.runs.config import SAERunConfig
from sparsify.settings.base_config import UserError
from sparsify.tlens.hooked_model import TLensModel
from sparsify.tlens.tokenizers import bos_token, load_tokenizer
from sparsify.training.config import TrainingConfig

MAX_COUNT_SECONDS = 20.0
"""Time for which the samples of data are counted."""


def open_text(config: SAERunConfig, data: DataConfig, model: TLensModel) -> TokenLoader:
    """Return batches of training or held-out text, as long as those of the run."""
    return build_loader(
        data,
        batch_size=config.batch_size,
        tokenizer=find_tokenizer(data, model),
        seed=config.seed,
        d_vocab=model.cfg.d_vocab,
        model_n_ctx=model.cfg.n_ctx,
    )


def find_tokenizer(data: DataConfig, model: TLensModel) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that data name, else the model's own, which it may not have."""
    if data.tokenizer_name and not data.is_tokenized:
        return load_tokenizer(data.tokenizer_name)
    return model.tokenizer


def kept_tokens(config: SAERunConfig, model: TLensModel) -> Kept | None:
    """Return the function that says which tokens losses and metrics count. None: all."""
    ignored = config.ignored_tokens
    if ignored is None:
        return None
    tokenizer = find_tokenizer(config.train_data, model)
    token = None if tokenizer is None else bos_token(tokenizer)
    ignored.check(token)
    return lambda tokens: kept_mask(tokens, ignored, token)


def load_eval_batches(config: SAERunConfig, model: TLensModel) -> list[Tensor]:
    """Return the held-out batches, where the model is. Empty if there is no held-out text."""
    if config.eval_data is None:
        return []
    return take_eval_batches(config, open_text(config, config.eval_data, model), model)


def take_eval_batches(config: SAERunConfig, loader: TokenLoader, model: TLensModel) -> list[Tensor]:
    """Return the first `eval_n_samples` of held-out text, where the model is."""
    n_batches = -(-config.eval_n_samples // config.batch_size)
    device = next(model.parameters()).device
    return [tokens.to(device) for tokens in islice(loader, n_batches)]


def seen_in_training(config: SAERunConfig) -> str | None:
    """Return a warning if the text of evaluations is that of training. None: it is another.

    Text that is the same under another name or in other files is not found.
    """
    train, held_out = config.train_data, config.eval_data
    if held_out is None:
        return None
    if any(
        getattr(train, name) != getattr(held_out, name)
        for name in ("dataset_name", "subset", "split")
    ):
        return None
    return (
        f"eval_data is the text that is trained on ('{train.dataset_name}', split "
        f"'{train.split}'), so that what was learned by heart counts as good; name another split "
        "or data set"
    )


def on_device(tokens: Tensor, device: torch.device) -> Tensor:
    """Return tokens where a model is, without waiting for what a GPU has still to do."""
    # From memory that is not pinned, a copy to a GPU would wait for all that it has to do.
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    return tokens.to(device, non_blocking=True)


def check_tokenizers(config: SAERunConfig, model: TLensModel) -> str:
    """Check the tokenizers of training and held-out text; returns what they are.

    Raises:
        UserError: One does not suit the model.
    """
    d_vocab = model.cfg.d_vocab
    found = {}
    for data in (config.train_data, config.eval_data):
        if data is not None and not data.is_tokenized:
            tokenizer = check_tokenizer(data, find_tokenizer(data, model), d_vocab)
            name = data.tokenizer_name or "the model's own"
            found[name] = f"{name}: {len(tokenizer):,} tokens of a vocabulary of {d_vocab:,}"
    return ", ".join(found.values()) or "not used: the data are token ids"


def describe_text(
    config: TrainingConfig, data: DataConfig, loader: TokenLoader, *, is_counted: bool
) -> str:
    """Return what training text is read; see `check_long_enough` if it is to be counted."""
    if is_counted:
        length = check_long_enough(data, loader, config.n_batches * config.batch_size)
    else:
        length = f"{data.dataset_name} {data.split}, sequences of {data.n_ctx} tokens"
    return f"{length} ({loader.found})"


def check_long_enough(data: DataConfig, loader: TokenLoader, n_samples: int) -> str:
    """See that training data last for `n_samples`, by counting until they do.

    What takes longer than `MAX_COUNT_SECONDS` to count is not refused.

    Raises:
        UserError: They do not.
    """
    name = f"{data.dataset_name} {data.split}"
    if data.n_epochs is None:
        return f"{name}: repeated without end (n_epochs: null), n_samples {n_samples:,}"
    n_wanted = -(-n_samples // data.n_epochs)
    n_found, end = 0, time.monotonic() + MAX_COUNT_SECONDS
    times = f" in {data.n_epochs} epochs" if data.n_epochs > 1 else ""
    for n_of_chunk in loader.samples_by_chunk():
        n_found += n_of_chunk
        found = f"{name}: at least {n_found * data.n_epochs:,} samples of {data.n_ctx} tokens"
        if n_found >= n_wanted:
            return f"{found}{times}, n_samples {n_samples:,}"
        if time.monotonic() > end:
            counted = f"(counted for {MAX_COUNT_SECONDS:.0f} s)"
            return f"{found}{times} {counted}, n_samples {n_samples:,}"
    n_epochs = -(-n_samples // max(1, n_found))
    raise UserError(
        f"train_data: '{name}' holds {n_found * data.n_epochs:,} samples of {data.n_ctx} tokens"
        f"{times}, less than n_samples ({n_samples:,}); set train_data.n_epochs to {n_epochs} or "
        "to null, give more data, or lower n_samples"
    )
