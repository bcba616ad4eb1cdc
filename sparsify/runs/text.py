"""Text of a run that trains SAEs: batches for its model, and which of their tokens count."""

from itertools import islice
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsify.data.config import DataConfig
from sparsify.data.loader import TokenLoader, build_loader
from sparsify.evaluation.evaluate import Kept
from sparsify.runs.config import SAERunConfig
from sparsify.tlens.hooked_model import TLensModel
from sparsify.tlens.tokenizers import bos_token, load_tokenizer


def open_text(
    config: SAERunConfig, data: DataConfig, model: TLensModel, num_workers: Literal[0, 1] = 1
) -> TokenLoader:
    """Return batches of training or held-out text, as long as those of the run."""
    return build_loader(
        data,
        batch_size=config.batch_size,
        tokenizer=find_tokenizer(data, model),
        seed=config.seed,
        d_vocab=model.cfg.d_vocab,
        model_n_ctx=model.cfg.n_ctx,
        num_workers=num_workers,
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
    return lambda tokens: ignored.kept(tokens, token)


def load_eval_batches(config: SAERunConfig, model: TLensModel) -> list[Tensor]:
    """Return the held-out batches, where the model is. Empty if there is no held-out text."""
    if config.eval_data is None:
        return []
    n_batches = -(-config.eval_n_samples // config.batch_size)
    loader = open_text(config, config.eval_data, model, num_workers=0)
    device = next(model.parameters()).device
    return [tokens.to(device) for tokens in islice(loader, n_batches)]
