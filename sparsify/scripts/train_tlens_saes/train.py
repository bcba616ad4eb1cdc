"""The training loop of SAEs inside a language model."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.base_config import UserError
from sparsify.evaluation.evaluate import evaluate
from sparsify.evaluation.results import Evaluation
from sparsify.evaluation.table import format_table
from sparsify.losses import total_loss
from sparsify.model_loading import resolve_device
from sparsify.runs import Runs
from sparsify.saved_runs import check_identity, model_identity
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.scripts.train_tlens_saes.parts import Parts, open_parts, trained_parameters
from sparsify.training.cadence import Cadence
from sparsify.training.checkpoints import load_metadata, weights_path
from sparsify.training.finite import check_gradient, check_loss, check_weights
from sparsify.training.firing_windows import FiringWindows
from sparsify.training.interrupt import held_interrupt, interrupt_says
from sparsify.training.memory import (
    estimate_memory,
    explained_out_of_memory,
    format_estimate,
)
from sparsify.training.optimizers import build_adam
from sparsify.training.plots import plot_training
from sparsify.training.preflight import check_disk_at_start
from sparsify.training.random_state import get_random_state, set_random_state
from sparsify.training.resume import (
    Checkpoint,
    checkpoint_to_go_on_from,
    clear_what_came_after,
    explained_misfit,
    folder_to_write_to,
    resume_line,
)
from sparsify.training.run_folder import (
    METRICS_FILE,
    check_save_dir,
    create_run_folder,
    held_run_folder,
    write_config,
    write_text,
)
from sparsify.training.saver import CheckpointSaver
from sparsify.training.schedules import build_lr_schedulers
from sparsify.training.sinks import Sink, open_sinks, report_early_end
from sparsify.training.steps import GradientStepper

KEPT_SETTINGS = (
    "tlens_model_name",
    "tlens_model_path",
    "tlens_model_processing",
    "saes",
    "loss",
    "train_data",
    "seed",
    "batch_size",
    "effective_batch_size",
    "lr",
)
"""What a run goes on with as it was."""


class Trainer:
    """One run: its parts, and how many samples it has seen."""

    def __init__(self, config: Config, parts: Parts) -> None:
        self.config = config
        self.n_samples = 0
        self.run_dir: Path | None = None
        # Samples trained on by then, and the result, which a resumed run does not have.
        self.last_evaluation: tuple[int | None, Evaluation | None] = (None, None)
        self.device = resolve_device(config.device)
        self.model, self.plan = parts.model, parts.plan
        self.loader, self.eval_batches = parts.loader, parts.eval_batches
        self.held = ExitStack()  # what must be let go at the end
        self.held.callback(self.loader.close)
        parameters = trained_parameters(self.model)
        for position in self.model.raw_sae_positions:
            self.model.saes.at(position).row_sparse_grads = True  # which this optimizer takes
        self.firing = FiringWindows(
            self.model, config.collect_act_frequency_every_n_samples, config.act_frequency_n_tokens
        )
        optimizers = [build_adam(parameters, config.lr)]
        # To look at each number would make a GPU wait; there it is done when something is logged.
        self.is_watched = self.device == "cpu"
        self.stepper = GradientStepper(
            parameters,
            optimizers,
            build_lr_schedulers(optimizers, config),
            n_accumulation_steps=config.n_accumulation_steps,
            max_grad_norm=config.max_grad_norm,
            before_step=self.check_gradient if self.is_watched else None,
        )

    def train(self, sink: Sink, saver: CheckpointSaver, is_interrupted: Callable[[], bool]) -> None:
        """Train until the config's number of samples, the end of the data, or Ctrl-C."""
        cadence = Cadence.from_config(self.config, start=self.n_samples)
        n_batches = self.config.n_batches - self.n_samples // self.config.batch_size
        grad_norm = torch.zeros(())
        if self.n_samples == 0:
            self.evaluate(sink)
        for tokens in islice(self.loader, n_batches):
            runs = self.model.run(self.on_device(tokens), self.plan)
            loss, terms = total_loss(self.config.loss, runs)
            is_logged = cadence.log.due(self.n_samples + len(tokens))
            is_saved = cadence.save_due(self.n_samples + len(tokens))
            if self.is_watched or is_logged or is_saved:
                check_loss(
                    *(loss, terms, tokens, self.n_samples, self.run_dir),
                    is_watched=self.is_watched,
                )
            stepped = self.stepper.backward(loss)
            grad_norm = grad_norm if stepped is None else stepped
            self.n_samples += len(tokens)

            if is_logged:
                learning = {"grad_norm": grad_norm.item(), "lr": self.stepper.lr}
                sink.log(train_metrics(loss, terms, runs) | learning, self.n_samples)
            if alive := self.firing.update(runs, self.n_samples):
                sink.log(alive, self.n_samples)
            if cadence.evaluate.due(self.n_samples):
                self.evaluate(sink)
            if is_saved:
                self.save(saver)
            if is_interrupted():
                break

    def evaluate(self, sink: Sink) -> Evaluation | None:
        """Judge the SAEs on held-out text, once as they are. None: there is no such text."""
        if not self.eval_batches:
            return None
        n_samples, evaluation = self.last_evaluation
        is_new = n_samples != self.n_samples
        if is_new or evaluation is None:
            evaluation = evaluate(self.model, self.eval_batches)
        if is_new:
            sink.log(evaluation.metrics(), self.n_samples)
        self.last_evaluation = (self.n_samples, evaluation)
        return evaluation

    def save(self, saver: CheckpointSaver) -> None:
        """Keep the SAEs' weights and what the run needs to go on."""
        weights = self.model.saes.state_dict()
        check_weights([*weights.values(), *self.stepper.gradients()], self.n_samples)
        saver.save(self.n_samples, weights, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, besides the SAEs' weights."""
        return {
            "stepper": self.stepper.state_dict(),
            "loader": self.loader.state_dict(),
            "firing": self.firing.state_dict(),
            "random": get_random_state(),
            "n_samples_evaluated": self.last_evaluation[0],
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the run."""
        self.run_dir, state = checkpoint.run_dir, checkpoint.state
        self.n_samples = checkpoint.n_samples
        self.last_evaluation = (state["n_samples_evaluated"], None)
        self.model.saes.load_state_dict(checkpoint.weights)
        self.stepper.load_state_dict(state["stepper"])
        self.loader.load_state_dict(state["loader"])
        self.firing.load_state_dict(state["firing"], self.n_samples)
        set_random_state(state["random"])

    def check_gradient(self, grad_norm: Tensor) -> None:
        """See that a gradient is finite, before an optimizer step."""
        check_gradient(grad_norm, self.n_samples)

    def on_device(self, tokens: Tensor) -> Tensor:
        """The tokens of a batch where the model is."""
        # From memory that is not pinned, a copy to a GPU would wait for all that it has to do.
        if torch.device(self.device).type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(self.device, non_blocking=True)

    def estimate_memory(self) -> dict[str, int]:
        """Bytes that a step takes, by what for."""
        n_tokens = self.config.batch_size * self.config.train_data.n_ctx
        is_saved = self.run_dir is not None
        return estimate_memory(self.model, self.plan, n_tokens, is_saved=is_saved)


def train_saes(config: Config) -> None:
    """Train SAEs as `config` says, judge them, and leave a run folder that can be loaded."""
    trainer = start(config) if config.resume is None else go_on(config)
    run_dir = trainer.run_dir
    try:
        with (
            trainer.held,
            open_sinks(
                config,
                run_name=config.run_name(config.default_run_name()),
                run_dir=run_dir,
                n_ctx=config.train_data.n_ctx,
                start=trainer.n_samples,
            ) as sink,
            CheckpointSaver(
                run_dir, config.keep_last, sink, model_identity(config), trainer.n_samples
            ) as saver,
        ):
            memory = trainer.estimate_memory()
            sink.console(format_estimate(memory))
            line = resume_line(run_dir) if run_dir is not None else "nothing was saved"
            with held_interrupt(line) as is_interrupted, explained_out_of_memory(memory):
                trainer.train(sink, saver, is_interrupted)
                saver.finish(partial(trainer.save, saver))
            with interrupt_says(line), explained_out_of_memory(memory):
                finish(trainer, sink, run_dir)
    except UserError:
        # Nothing to keep: no step was taken, and no batch put there to be looked at.
        if run_dir is not None and trainer.n_samples == 0 and not any(run_dir.glob("bad_*")):
            shutil.rmtree(run_dir)
        raise


def start(config: Config) -> Trainer:
    """A new run, and its folder, which is made once all that the config names has been opened."""
    if config.save_dir is not None:
        check_save_dir(config.save_dir)
    trainer = Trainer(config, open_parts(config))
    check_disk_at_start(config, trainer.model.saes, trainer.stepper.parameters)
    if config.save_dir is not None:
        run_name = config.run_name(config.default_run_name())
        trainer.run_dir = create_run_folder(config.save_dir, run_name)
        trainer.held.enter_context(held_run_folder(trainer.run_dir))
        write_config(trainer.run_dir, config)
    return trainer


def go_on(config: Config) -> Trainer:
    """The run that `config.resume` means, at its newest checkpoint or the one that is meant."""
    with ExitStack() as held:
        held.enter_context(held_run_folder(folder_to_write_to(config)))
        checkpoint = find_checkpoint(config)
        # The config that is kept is one from which the whole run can be repeated.
        trainer = Trainer(config.model_copy(update={"resume": None}), open_parts(config))
        with explained_misfit(checkpoint):
            trainer.resume(checkpoint)
        saved, trained = trainer.model.saes, trainer.stepper.parameters
        check_disk_at_start(config, saved, trained, checkpoint.n_samples)
        clear_what_came_after(checkpoint, checkpoint.run_dir / METRICS_FILE)
        write_config(checkpoint.run_dir, trainer.config)
        trainer.held.push(held.pop_all())
    return trainer


def find_checkpoint(config: Config) -> Checkpoint:
    """What `config.resume` means, if its SAEs belong to the config's model."""
    checkpoint = checkpoint_to_go_on_from(config, KEPT_SETTINGS)
    weights = weights_path(checkpoint.run_dir, checkpoint.n_samples)
    check_identity(weights, load_metadata(weights), model_identity(config))
    return checkpoint


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
