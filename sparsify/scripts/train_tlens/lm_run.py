"""A run that trains a small language model: its parts, its loop, its result."""

import sys
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsify.data.config import DataConfig
from sparsify.data.loader import TokenLoader, build_loader, check_tokenizer
from sparsify.data.sources import open_documents
from sparsify.kernels.chunked import chunked_cross_entropy
from sparsify.runs.plots import plot_training
from sparsify.runs.run_folder import write_result
from sparsify.runs.session import Session
from sparsify.runs.text import describe_text
from sparsify.runs.training_run import OpeningStep, TrainingRun
from sparsify.scripts.train_tlens.card import write_card
from sparsify.scripts.train_tlens.config import Config
from sparsify.scripts.train_tlens.evaluation import TextLoss, bytes_per_token, text_loss
from sparsify.scripts.train_tlens.trigram import TrigramModel
from sparsify.tlens.loading import resolve_device
from sparsify.tlens.native_model import TrainableModel, save_language_model
from sparsify.tlens.tokenizers import load_tokenizer, train_tokenizer
from sparsify.training.batch_loss import BatchLoss
from sparsify.training.finite import check_gradient
from sparsify.training.optimizers import build_muon
from sparsify.training.steps import build_stepper

MODEL_FOLDER = "model"
MAX_TRIAL_CHUNKS = 20
"""Chunks of the training text on which a dry run trains a tokenizer: 5 MB."""


class LanguageModelRun(TrainingRun[Tensor]):
    """A language model trained from scratch, on batches of token ids."""

    kept_settings = (
        "model",
        "tokenizer",
        "train_data",
        "seed",
        "batch_size",
        "effective_batch_size",
        "lr",
        "adam_lr",
    )
    memory_remedies: ClassVar[str] = (
        "batch_size (keep effective_batch_size), train_data.n_ctx, or the model's sizes"
    )
    weights_step: ClassVar[str] = "model"
    config: Config

    def train(self, session: Session[Tensor]) -> None:
        """Train the model on the batches of a session: the loop."""
        for tokens in session.batches():
            due = session.due_after(tokens)
            loss = self.batch_loss(tokens)
            session.check(loss, tokens, due)
            self.learn_from(loss, tokens)
            session.count(tokens)

            if due.log:
                learning = {"grad_norm": self.stepper.grad_norm.item(), "lr": self.stepper.lr}
                session.log({"loss": loss.total.item(), **learning})
            if due.evaluate:
                session.log(loss_metrics(self.evaluate(self.config.eval_n_samples)))
            if due.save:
                session.save()

    def batch_loss(self, batch: Tensor) -> BatchLoss:
        """Return the mean cross-entropy of predicting each token but the first, in nats."""
        tokens = batch.to(self.device)
        resid = self.model.final_residual(tokens[:, :-1])
        return BatchLoss(chunked_cross_entropy(resid, tokens[:, 1:], self.model.unembed), {})

    def evaluate(self, n_samples: int | None) -> TextLoss:
        """Return the loss on the first `n_samples` held-out sequences. None: on all."""
        n_batches = sys.maxsize if n_samples is None else -(-n_samples // self.config.batch_size)
        return text_loss(self.model, islice(self.eval_loader, n_batches), self.token_bytes)

    def finish(self, session: Session[Tensor]) -> str:
        """Evaluate model and trigram baseline on all held-out text; write the model's folder."""
        assert self.run_dir is not None, "the config's validator refuses a save_dir of null"
        config, folder = self.config, self.run_dir / MODEL_FOLDER
        save_language_model(folder, self.model, torch.float16)
        # What is measured is what is written: weights rounded to half precision.
        self.model.half().float()
        loss = self.evaluate(n_samples=None)
        session.log(loss_metrics(loss))
        baseline = self.trigram_loss()
        write_card(folder, config, self.model, self.tokenizer, loss, baseline, self.n_samples)
        write_result(self.run_dir, {"metrics": loss_metrics(loss)})
        plot_training(self.run_dir)
        return (
            f"bits per byte: {loss.bits_per_byte:.3f}, trigram model {baseline.bits_per_byte:.3f}\n"
            f"model, tokenizer and card: {folder}"
        )

    def trigram_loss(self) -> TextLoss:
        """Return the held-out loss of a trigram model of one epoch of the training tokens."""
        one_epoch = self.config.train_data.model_copy(update={"n_epochs": 1})
        model = TrigramModel(self.all_tokens(one_epoch), self.config.model.d_vocab)
        return model.text_loss(self.all_tokens(self.config.eval_data), self.token_bytes)

    def all_tokens(self, data: DataConfig) -> np.ndarray:
        """Return all sequences of some data, shape `sample pos`."""
        return np.concatenate([batch.numpy() for batch in self.open_text(data)])

    # What is opened

    def opening_steps(self) -> list[OpeningStep]:
        """Return the steps that open model, tokenizer and text."""
        return [
            OpeningStep("model", self.open_model),
            OpeningStep("tokenizer", self.open_tokenizer),
            OpeningStep("train_data", self.open_train_data, needs=("tokenizer",)),
            OpeningStep("eval_data", self.open_eval_data, needs=("tokenizer",)),
        ]

    def open_model(self) -> str:
        """Make a model with random weights."""
        config, cfg = self.config, self.config.model
        self.device = resolve_device(config.device)
        self.model = TrainableModel(cfg, seed=config.seed).to(self.device)
        n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"{n_parameters:,} parameters: {cfg.n_layers} blocks of width {cfg.d_model}, context "
            f"{cfg.n_ctx:,}, vocabulary {cfg.d_vocab:,}, on {self.device}"
        )

    def open_tokenizer(self) -> str:
        """Load the tokenizer, or train one on the text."""
        config = self.config
        if self.run_dir is not None:
            origin = "the run's own"
            self.tokenizer = load_tokenizer(self.run_dir / MODEL_FOLDER)
        else:
            is_new = config.tokenizer is not None
            text = "up to 5 MB of train_data, to try it" if self.is_trial else "train_data"
            origin = f"trained on {text}" if is_new else config.train_data.tokenizer_name
            self.tokenizer = make_tokenizer(config, MAX_TRIAL_CHUNKS if self.is_trial else None)
        d_vocab = config.model.d_vocab
        for data in (config.train_data, config.eval_data):
            check_tokenizer(data, self.tokenizer, d_vocab)
        self.token_bytes = bytes_per_token(self.tokenizer)
        return f"{origin}: {len(self.tokenizer):,} tokens of a vocabulary of {d_vocab:,}"

    def open_train_data(self) -> str:
        """Open the text to train on."""
        self.loader = self.open_text(self.config.train_data)
        return describe_text(
            self.config, self.config.train_data, self.loader, is_counted=self.is_trial
        )

    def open_eval_data(self) -> str:
        """Open the held-out text."""
        data = self.config.eval_data
        self.eval_loader = self.open_text(data)
        if self.is_trial:
            next(iter(self.eval_loader))  # raises if there is not a batch
        length = f"{data.dataset_name} {data.split}, sequences of {data.n_ctx} tokens"
        return f"{length} ({self.eval_loader.found})"

    def open_text(self, data: DataConfig) -> TokenLoader:
        """Return batches of training or held-out text."""
        return build_loader(
            data,
            batch_size=self.config.batch_size,
            tokenizer=self.tokenizer,
            seed=self.config.seed,
            d_vocab=self.config.model.d_vocab,
            model_n_ctx=self.config.model.n_ctx,
        )

    def build(self) -> None:
        """Make the optimizers."""
        config = self.config
        optimizers = build_muon(self.model.named_parameters(), config.lr, config.adam_lr)
        self.stepper = build_stepper(
            self.model.parameters(),
            optimizers,
            config,
            before_step=lambda grad_norm: check_gradient(grad_norm, self.n_samples),
        )

    # What the library asks

    @property
    def trained(self) -> torch.nn.Module:
        """The model."""
        return self.model

    @property
    def items_per_sample(self) -> int:
        """Tokens in a sequence."""
        return self.config.train_data.n_ctx

    def on_folder(self, run_dir: Path) -> None:
        """Write the tokenizer, which a resumed run must not train again."""
        self.tokenizer.save_pretrained(run_dir / MODEL_FOLDER)

    def tensors_of(self, batch: Tensor) -> dict[str, Tensor]:
        """Return the tokens."""
        return {"tokens": batch}


def loss_metrics(loss: TextLoss) -> dict[str, float]:
    """Return a held-out loss under the names that are logged."""
    return {
        "performance/eval/ce_loss": loss.nats_per_token,
        "performance/eval/bits_per_byte": loss.bits_per_byte,
    }


def make_tokenizer(config: Config, max_chunks: int | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a new run: one that exists, or one trained on its text.

    Args:
        config: Which of the two.
        max_chunks: Chunks of documents to train one on. None: all.
    """
    if config.tokenizer is None:
        return load_tokenizer(str(config.train_data.tokenizer_name))
    chunks = open_documents(config.train_data).chunks(np.random.default_rng(config.seed), None)
    texts = (str(text) for chunk in islice(chunks, max_chunks) for text in chunk.documents)
    return train_tokenizer(texts, config.tokenizer.vocab_size)
