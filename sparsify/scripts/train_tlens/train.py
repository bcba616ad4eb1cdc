"""The training loop of a small language model."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsify.data.config import DataConfig
from sparsify.data.loader import TokenLoader, build_loader
from sparsify.data.sources import open_documents
from sparsify.kernels.chunked import chunked_cross_entropy
from sparsify.runs.checkpoints import Checkpoint
from sparsify.runs.disk import check_disk_at_start
from sparsify.runs.interrupt import held_interrupt, interrupt_says
from sparsify.runs.resume import (
    checkpoint_to_go_on_from,
    clear_what_came_after,
    explained_misfit,
    folder_to_write_to,
    resume_line,
)
from sparsify.runs.run_folder import (
    METRICS_FILE,
    check_save_dir,
    create_run_folder,
    held_run_folder,
    write_config,
)
from sparsify.runs.saver import CheckpointSaver
from sparsify.runs.sink import Sink
from sparsify.runs.sinks import open_sinks, report_early_end
from sparsify.scripts.train_tlens.card import write_card
from sparsify.scripts.train_tlens.config import Config
from sparsify.scripts.train_tlens.evaluation import TextLoss, bytes_per_token, text_loss
from sparsify.scripts.train_tlens.trigram import TrigramModel
from sparsify.tlens.native_model import TrainableModel, save_language_model
from sparsify.tlens.tokenizers import load_tokenizer, train_tokenizer
from sparsify.training.cadence import Cadence
from sparsify.training.finite import check_gradient, check_loss, check_weights
from sparsify.training.optimizers import build_muon
from sparsify.training.random_state import get_random_state, set_random_state, set_seed
from sparsify.training.schedules import build_lr_schedulers
from sparsify.training.steps import GradientStepper

MODEL_FOLDER = "model"
KEPT_SETTINGS = (
    "model",
    "tokenizer",
    "train_data",
    "seed",
    "batch_size",
    "effective_batch_size",
    "lr",
    "adam_lr",
)
"""What a run goes on with as it was."""


class Trainer:
    """One run: its parts, and how many samples it has seen."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        set_seed(config.seed)
        self.config = config
        self.n_samples = 0
        self.tokenizer = tokenizer
        self.token_bytes = bytes_per_token(self.tokenizer)
        self.model = TrainableModel(config.model, seed=config.seed)
        self.loader = open_data(config, config.train_data, tokenizer)
        self.held = ExitStack()  # what must be let go at the end
        self.held.callback(self.loader.close)
        self.eval_loader = open_data(config, config.eval_data, tokenizer, num_workers=0)
        optimizers = build_muon(self.model.named_parameters(), config.lr, config.adam_lr)
        self.stepper = GradientStepper(
            self.model.parameters(),
            optimizers,
            build_lr_schedulers(optimizers, config),
            n_accumulation_steps=config.n_accumulation_steps,
            max_grad_norm=config.max_grad_norm,
            before_step=lambda grad_norm: check_gradient(grad_norm, self.n_samples),
        )

    def train(self, sink: Sink, saver: CheckpointSaver, is_interrupted: Callable[[], bool]) -> None:
        """Train until the config's number of samples, the end of the data, or Ctrl-C."""
        cadence = Cadence.from_config(self.config, start=self.n_samples)
        n_batches = self.config.n_batches - self.n_samples // self.config.batch_size
        for tokens in islice(self.loader, n_batches):
            loss = next_token_loss(self.model, tokens)
            check_loss(loss, {}, tokens, self.n_samples, saver.run_dir, is_watched=True)
            self.stepper.backward(loss)
            self.n_samples += len(tokens)

            if cadence.log.due(self.n_samples):
                sink.log({"loss": loss.item(), "lr": self.stepper.lr}, self.n_samples)
            if cadence.evaluate.due(self.n_samples):
                sink.log(loss_metrics(self.evaluate(self.config.eval_n_samples)), self.n_samples)
            if cadence.save_due(self.n_samples):
                self.save(saver)
            if is_interrupted():
                break

    def evaluate(self, n_samples: int | None) -> TextLoss:
        """Loss on the first `n_samples` held-out sequences. None: on all."""
        n_batches = sys.maxsize if n_samples is None else -(-n_samples // self.config.batch_size)
        return text_loss(self.model, islice(self.eval_loader, n_batches), self.token_bytes)

    def save(self, saver: CheckpointSaver) -> None:
        """Write the weights, and what the run needs to go on."""
        weights = self.model.state_dict()
        check_weights([*weights.values(), *self.stepper.gradients()], self.n_samples)
        state = {
            "stepper": self.stepper.state_dict(),
            "loader": self.loader.state_dict(),
            "random": get_random_state(),
        }
        saver.save(self.n_samples, weights, state)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the run."""
        self.n_samples = checkpoint.n_samples
        self.model.load_state_dict(checkpoint.weights)
        self.stepper.load_state_dict(checkpoint.state["stepper"])
        self.loader.load_state_dict(checkpoint.state["loader"])
        set_random_state(checkpoint.state["random"])


def train_language_model(config: Config) -> None:
    """Train a model as `config` says, or go on with a run, and write its `model/` folder."""
    trainer, run_dir = start(config) if config.resume is None else go_on(config)
    write_config(run_dir, trainer.config)
    with (
        trainer.held,
        open_sinks(
            config,
            run_name=config.run_name,
            run_dir=run_dir,
            n_ctx=config.train_data.n_ctx,
            start=trainer.n_samples,
        ) as sink,
        CheckpointSaver(run_dir, config.keep_last, sink, start=trainer.n_samples) as saver,
    ):
        with held_interrupt(resume_line(run_dir)) as is_interrupted:
            trainer.train(sink, saver, is_interrupted)
            saver.finish(partial(trainer.save, saver))
        with interrupt_says(resume_line(run_dir)):
            finish(trainer, sink, run_dir / MODEL_FOLDER)


def start(config: Config) -> tuple[Trainer, Path]:
    """A new run, and its folder, which is made once all that the config names has been opened."""
    assert config.save_dir is not None, "the config's validator refuses null"
    check_save_dir(config.save_dir)
    trainer = Trainer(config, make_tokenizer(config))
    check_disk_at_start(config, trainer.model, trainer.stepper.parameters)
    run_dir = create_run_folder(config.save_dir, config.run_name)
    trainer.held.enter_context(held_run_folder(run_dir))
    trainer.tokenizer.save_pretrained(run_dir / MODEL_FOLDER)
    return trainer, run_dir


def go_on(config: Config) -> tuple[Trainer, Path]:
    """The run that `config.resume` means, at its newest checkpoint or the one that is meant."""
    with ExitStack() as held:
        held.enter_context(held_run_folder(folder_to_write_to(config)))
        checkpoint = checkpoint_to_go_on_from(config, KEPT_SETTINGS)
        run_dir = checkpoint.run_dir
        # The config that is kept is one from which the whole run can be repeated.
        whole_run = config.model_copy(update={"resume": None})
        trainer = Trainer(whole_run, load_tokenizer(str(run_dir / MODEL_FOLDER)))
        with explained_misfit(checkpoint):
            trainer.resume(checkpoint)
        saved, trained = trainer.model, trainer.stepper.parameters
        check_disk_at_start(config, saved, trained, checkpoint.n_samples)
        clear_what_came_after(checkpoint, run_dir / METRICS_FILE)
        trainer.held.push(held.pop_all())
    return trainer, run_dir


def next_token_loss(model: TrainableModel, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of predicting each token but the first, in nats."""
    resid = model.final_residual(tokens[:, :-1])
    return chunked_cross_entropy(resid, tokens[:, 1:], model.unembed)


def loss_metrics(loss: TextLoss) -> dict[str, float]:
    """A held-out loss under the names that are logged."""
    return {
        "performance/eval/ce_loss": loss.nats_per_token,
        "performance/eval/bits_per_byte": loss.bits_per_byte,
    }


def open_data(
    config: Config,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_workers: Literal[0, 1] = 1,
) -> TokenLoader:
    """Batches of a run's training or held-out data."""
    return build_loader(
        data,
        batch_size=config.batch_size,
        tokenizer=tokenizer,
        seed=config.seed,
        d_vocab=config.model.d_vocab,
        model_n_ctx=config.model.n_ctx,
        num_workers=num_workers,
    )


def make_tokenizer(config: Config, max_chunks: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a new run: one that exists, or one trained on its data.

    Args:
        config: Which of the two.
        max_chunks: Chunks of documents to train one on. None: all.
    """
    if config.tokenizer is None:
        return load_tokenizer(str(config.train_data.tokenizer_name))
    chunks = open_documents(config.train_data).chunks(np.random.default_rng(config.seed), None)
    texts = (str(text) for chunk in islice(chunks, max_chunks) for text in chunk.documents)
    return train_tokenizer(texts, config.tokenizer.vocab_size)


def finish(trainer: Trainer, sink: Sink, folder: Path) -> None:
    """Judge the model on all held-out text, beside the trigram baseline, and write its folder."""
    config = trainer.config
    n_wanted = config.n_batches * config.batch_size
    report_early_end(sink, trainer.n_samples, n_wanted, "the model was")
    save_language_model(folder, trainer.model, torch.float16)
    # What is measured is what is written: weights rounded to half precision.
    trainer.model.half().float()
    loss = trainer.evaluate(n_samples=None)
    sink.log(loss_metrics(loss), trainer.n_samples)
    baseline = trigram_loss(trainer)
    write_card(folder, config, trainer.model, trainer.tokenizer, loss, baseline, trainer.n_samples)
    sink.console(
        f"bits per byte: {loss.bits_per_byte:.3f}, trigram model {baseline.bits_per_byte:.3f}\n"
        f"model, tokenizer and card: {folder}"
    )


def trigram_loss(trainer: Trainer) -> TextLoss:
    """Loss of a trigram model of one epoch of the training tokens, on all held-out text."""
    one_epoch = trainer.config.train_data.model_copy(update={"n_epochs": 1})
    model = TrigramModel(_all_tokens(trainer, one_epoch), trainer.config.model.d_vocab)
    return model.text_loss(_all_tokens(trainer, trainer.config.eval_data), trainer.token_bytes)


def _all_tokens(trainer: Trainer, data: DataConfig) -> np.ndarray:
    """All sequences, shape `sample pos`."""
    loader = open_data(trainer.config, data, trainer.tokenizer)
    return np.concatenate([batch.numpy() for batch in loader])
