"""The training loop of SAEs inside a language model."""

import json
import math
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsify.base_config import UserError
from sparsify.data.config import DataConfig
from sparsify.data.loader import TokenLoader, build_loader
from sparsify.data.tokenizers import load_tokenizer
from sparsify.evaluation.evaluate import evaluate
from sparsify.evaluation.firing import FiringCounter
from sparsify.evaluation.results import Evaluation
from sparsify.evaluation.table import format_table
from sparsify.forward_plan import derive_plan
from sparsify.losses import total_loss
from sparsify.model_loading import resolve_device
from sparsify.runs import Runs
from sparsify.sae_transformer import SAETransformer
from sparsify.saved_runs import build_sae_transformer, model_identity
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.training.cadence import Cadence, Every
from sparsify.training.interrupt import held_interrupt
from sparsify.training.memory import (
    estimate_memory,
    explained_out_of_memory,
    format_estimate,
)
from sparsify.training.optimizers import build_adam
from sparsify.training.plots import plot_training
from sparsify.training.precision import set_precision
from sparsify.training.random_state import set_seed
from sparsify.training.run_folder import (
    check_save_dir,
    create_run_folder,
    write_config,
    write_text,
)
from sparsify.training.schedules import build_lr_schedulers
from sparsify.training.sinks import Sink, open_sinks, report_early_end
from sparsify.training.steps import GradientStepper


class Trainer:
    """One run: its parts, and how many samples it has seen."""

    def __init__(self, config: Config) -> None:
        set_seed(config.seed)
        self.config = config
        self.n_samples = 0
        self.last_evaluation: tuple[int, Evaluation] | None = None
        self.n_samples_saved: int | None = None
        self.device = resolve_device(config.device)
        self.model = build_sae_transformer(config, self.device)
        set_precision(self.model, config.mixed_precision)
        self.plan = derive_plan(self.model.hooked_model, self.model.raw_sae_positions, config.loss)
        self.loader = self.build_loader(config.train_data)
        self.eval_batches = self.load_eval_batches()
        parameters = [p for p in self.model.saes.parameters() if p.requires_grad]
        if not parameters:
            raise UserError(
                "saes.retrain_saes: false leaves nothing to train, since all SAEs come from "
                "pretrained_sae_paths; set it to true"
            )
        for position in self.model.raw_sae_positions:
            self.model.saes.at(position).row_sparse_grads = True  # which this optimizer takes
        optimizers = [build_adam(parameters, config.lr)]
        self.stepper = GradientStepper(
            parameters,
            optimizers,
            build_lr_schedulers(optimizers, config),
            n_accumulation_steps=config.n_accumulation_steps,
            max_grad_norm=config.max_grad_norm,
        )

    def train(self, sink: Sink, is_interrupted: Callable[[], bool]) -> None:
        """Train until the config's number of samples, the end of the data, or Ctrl-C."""
        cadence = Cadence.from_config(self.config)
        firing = FiringWindows(self.config, self.model)
        grad_norm = torch.zeros(())
        self.evaluate(sink)
        for tokens in islice(self.loader, self.config.n_batches):
            runs = self.model.run(self.on_device(tokens), self.plan)
            loss, terms = total_loss(self.config.loss, runs)
            stepped = self.stepper.backward(loss)
            grad_norm = grad_norm if stepped is None else stepped
            self.n_samples += len(tokens)

            if cadence.log.due(self.n_samples):
                learning = {"grad_norm": grad_norm.item(), "lr": self.stepper.lr}
                metrics = train_metrics(loss, terms, runs) | learning
                sink.log(metrics, self.n_samples)
                check_finite(metrics, self.n_samples)
            if alive := firing.update(runs, self.n_samples):
                sink.log(alive, self.n_samples)
            if cadence.evaluate.due(self.n_samples):
                self.evaluate(sink)
            if cadence.save.due(self.n_samples):
                self.save(sink)
            if is_interrupted():
                break

    def evaluate(self, sink: Sink) -> Evaluation | None:
        """Judge the SAEs on held-out text, once as they are. None: there is no such text."""
        if not self.eval_batches:
            return None
        if self.last_evaluation is None or self.last_evaluation[0] != self.n_samples:
            evaluation = evaluate(self.model, self.eval_batches)
            sink.log(evaluation.metrics(), self.n_samples)
            self.last_evaluation = (self.n_samples, evaluation)
        return self.last_evaluation[1]

    def save(self, sink: Sink) -> None:
        """Keep the SAEs' weights, once as they are."""
        if self.n_samples_saved != self.n_samples:
            sink.save(self.model.saes.state_dict(), self.n_samples)
            self.n_samples_saved = self.n_samples

    def on_device(self, tokens: Tensor) -> Tensor:
        """The tokens of a batch where the model is."""
        # From memory that is not pinned, a copy to a GPU would wait for all that it has to do.
        if torch.device(self.device).type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(self.device, non_blocking=True)

    def estimate_memory(self) -> dict[str, int]:
        """Bytes that a step takes, by what for."""
        n_tokens = self.config.batch_size * self.config.train_data.n_ctx
        return estimate_memory(self.model, self.plan, n_tokens)

    def build_loader(self, data: DataConfig, num_workers: Literal[0, 1] = 1) -> TokenLoader:
        """Batches of training or held-out data."""
        tlens_model: Any = self.model.tlens_model  # its attributes are not declared
        name, default = data.tokenizer_name, tlens_model.tokenizer
        return build_loader(
            data,
            batch_size=self.config.batch_size,
            tokenizer=load_tokenizer(name) if name and not data.is_tokenized else default,
            seed=self.config.seed,
            d_vocab=tlens_model.cfg.d_vocab,
            model_n_ctx=tlens_model.cfg.n_ctx,
            num_workers=num_workers,
        )

    def load_eval_batches(self) -> list[Tensor]:
        """The held-out batches, the same for every evaluation."""
        if self.config.eval_data is None:
            return []
        n_batches = -(-self.config.eval_n_samples // self.config.batch_size)
        loader = self.build_loader(self.config.eval_data, num_workers=0)
        return [tokens.to(self.device) for tokens in islice(loader, n_batches)]


def train_saes(config: Config) -> None:
    """Train SAEs as `config` says, judge them, and leave a run folder that can be loaded."""
    if config.save_dir is not None:
        check_save_dir(config.save_dir)
    trainer = Trainer(config)
    run_name = config.run_name(config.default_run_name())
    run_dir = None
    if config.save_dir is not None:
        run_dir = create_run_folder(config.save_dir, run_name)
        write_config(run_dir, config)
    try:
        with open_sinks(
            config,
            run_name=run_name,
            run_dir=run_dir,
            n_ctx=config.train_data.n_ctx,
            metadata=model_identity(config),
        ) as sink:
            memory = trainer.estimate_memory()
            sink.console(format_estimate(memory))
            with held_interrupt() as is_interrupted, explained_out_of_memory(memory):
                trainer.train(sink, is_interrupted)
                trainer.save(sink)
            finish(trainer, sink, run_dir)
    except UserError:
        if run_dir is not None and trainer.n_samples == 0:  # nothing to keep
            shutil.rmtree(run_dir)
        raise


def finish(trainer: Trainer, sink: Sink, run_dir: Path | None) -> None:
    """Judge the trained SAEs, and say what came out and how to load it."""
    n_wanted = trainer.config.n_batches * trainer.config.batch_size
    report_early_end(sink, trainer.n_samples, n_wanted, "the SAEs were")
    if (evaluation := trainer.evaluate(sink)) is not None:
        print(format_table(evaluation))
    if run_dir is None:
        return
    if evaluation is not None:
        write_text(run_dir / "eval.json", json.dumps(evaluation.to_json(), indent=1) + "\n")
    plot_training(run_dir)
    print(
        "\nLoad the result:\n\n"
        "  from sparsify import SAETransformer\n"
        f'  model = SAETransformer.from_local_path("{run_dir}")\n'
        '  logits, acts = model(model.to_tokens("def main("))\n'
    )


def train_metrics(loss: Tensor, terms: dict[str, Tensor], runs: Runs) -> dict[str, float]:
    """Numbers of one batch, under the names that are logged; terms without their coefficients."""
    metrics = {"loss": loss.item()}
    metrics |= {f"loss/train/{name}": value.item() for name, value in terms.items()}
    for position, acts in runs.sae_acts.items():
        l0 = (acts.c != 0).sum(dim=-1).float().mean()
        metrics[f"sparsity/train/L_0/{position}"] = l0.item()
    return metrics


def check_finite(metrics: dict[str, float], n_samples: int) -> None:
    """Raise a `UserError` if a number is not finite: training on would lead nowhere."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} is {value} after {n_samples} samples; go back to an earlier checkpoint, "
                "and lower lr or set max_grad_norm"
            )


class FiringWindows:
    """Counts alive dictionary elements over stretches of training tokens.

    One begins every `collect_act_frequency_every_n_samples`, for `act_frequency_n_tokens`.
    """

    def __init__(self, config: Config, model: SAETransformer) -> None:
        self.n_tokens = config.act_frequency_n_tokens
        self.begins = Every(config.collect_act_frequency_every_n_samples)
        device = next(model.saes.parameters()).device
        self.counters = {
            position: FiringCounter(model.saes.at(position).n_dict, device)
            for position in model.raw_sae_positions
        }
        self.is_open = False

    def update(self, runs: Runs, n_samples: int) -> dict[str, float]:
        """Count a batch if a stretch is on; the alive elements if it ends, else nothing."""
        if self.begins.due(n_samples):
            self.is_open = True
        if not self.is_open:
            return {}
        for position, acts in runs.sae_acts.items():
            self.counters[position].update(acts.c)
        if next(iter(self.counters.values())).n_tokens < self.n_tokens:
            return {}
        alive = {
            f"sparsity/alive_dict_elements/{position}": float(counter.n_alive)
            for position, counter in self.counters.items()
        }
        for counter in self.counters.values():
            counter.reset()
        self.is_open = False
        return alive
