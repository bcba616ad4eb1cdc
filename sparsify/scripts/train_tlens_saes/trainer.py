"""The training loop of SAEs inside a language model."""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.evaluation.evaluate import evaluate
from sparsify.evaluation.results import Evaluation
from sparsify.losses.loss import total_loss
from sparsify.losses.passes import Passes
from sparsify.runs.checkpoints import Checkpoint
from sparsify.runs.saver import CheckpointSaver
from sparsify.runs.sink import Sink
from sparsify.runs.text import kept_tokens
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.scripts.train_tlens_saes.parts import Parts, trained_parameters
from sparsify.tlens.loading import resolve_device
from sparsify.training.cadence import Cadence, Every
from sparsify.training.coefficients import Coefficients
from sparsify.training.dead_elements import DeadElements, resample
from sparsify.training.decoder_bias import set_decoder_bias
from sparsify.training.finite import check_gradient, check_loss, check_weights
from sparsify.training.firing_windows import FiringWindows
from sparsify.training.forward_passes import forward_passes
from sparsify.training.memory import estimate_memory
from sparsify.training.optimizers import build_adam
from sparsify.training.random_state import get_random_state, set_random_state
from sparsify.training.schedules import build_lr_schedulers
from sparsify.training.steps import GradientStepper


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
        self.saes = {name: self.model.saes.at(name) for name in self.model.raw_sae_positions}
        for sae in self.saes.values():
            sae.row_sparse_grads = True  # which this optimizer takes
        self.trained_saes = {name: sae for name, sae in self.saes.items() if sae.is_trained}
        self.firing = FiringWindows(
            self.model, config.collect_act_frequency_every_n_samples, config.act_frequency_n_tokens
        )
        self.coefficients = Coefficients(
            config.loss, self.trained_saes, config.n_samples, torch.device(self.device)
        )
        self.dead = config.dead_elements and DeadElements(config.dead_elements, self.saes)
        self.resampling = Every(config.resampling and config.resampling.every_n_samples)
        self.kept = kept_tokens(config, self.model.tlens_model)
        optimizers = [build_adam(parameters, config.lr)]
        # To look at each number would make a GPU wait; there it is done when something is logged.
        self.is_watched = self.device == "cpu"
        self.stepper = GradientStepper(
            parameters,
            optimizers,
            build_lr_schedulers(optimizers, config),
            n_accumulation_steps=config.n_accumulation_steps,
            max_grad_norm=config.max_grad_norm,
            constrained=list(self.trained_saes.values()),
            before_step=self.check_gradient if self.is_watched else None,
        )

    def train(self, sink: Sink, saver: CheckpointSaver, is_interrupted: Callable[[], bool]) -> None:
        """Train until the config's number of samples, the end of the data, or Ctrl-C."""
        cadence = Cadence.from_config(self.config, start=self.n_samples)
        n_batches = self.config.n_batches - self.n_samples // self.config.batch_size
        grad_norm = torch.zeros(())
        self.model.train()
        for position in self.saes.keys() - self.trained_saes.keys():
            self.saes[position].eval()
        if self.n_samples == 0:
            self.evaluate(sink)
        for tokens in islice(self.loader, n_batches):
            if self.n_samples == 0 and self.config.decoder_bias is not None:
                self.set_decoder_bias(tokens)
            passes = self.run(tokens)
            loss, terms = total_loss(self.config.loss, passes, self.coefficients.factor)
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
            self.learn_from(passes, is_step=stepped is not None)

            if is_logged:
                learning = {"grad_norm": grad_norm.item(), "lr": self.stepper.lr}
                learning |= self.coefficients.metrics() | (self.dead.metrics() if self.dead else {})
                sink.log(train_metrics(loss, terms, passes) | learning, self.n_samples)
            if alive := self.firing.update(passes, self.n_samples):
                sink.log(alive, self.n_samples)
            if cadence.evaluate.due(self.n_samples):
                self.evaluate(sink)
            if is_saved:
                self.save(saver)
            if is_interrupted():
                break

    def run(self, tokens: Tensor) -> Passes:
        """What the loss of a batch is computed from."""
        tokens = self.on_device(tokens)
        passes = forward_passes(self.model, tokens, self.plan)
        if self.kept is not None:
            passes = passes.only(self.kept(tokens))
        return passes if self.dead is None else self.dead.marked(passes)

    def learn_from(self, passes: Passes, *, is_step: bool) -> None:
        """What no gradient teaches: who fires; after a step also coefficients, new elements."""
        for position, sae in self.trained_saes.items():
            sae.learn_from(passes.sae_acts[position])
        if self.dead is not None:
            self.dead.update(passes)
        if not is_step:
            return
        self.coefficients.update(passes, self.n_samples)
        resampling = self.config.resampling
        if resampling is None or not self.resampling.due(self.n_samples):
            return
        if self.n_samples <= resampling.until_n_samples and self.dead is not None:
            for position, sae in self.trained_saes.items():
                dead, acts = self.dead.dead(position), passes.sae_acts[position]
                self.dead.forget(position, resample(sae, acts, dead, self.stepper.optimizers[0]))

    def set_decoder_bias(self, tokens: Tensor) -> None:
        """Set the decoders' biases to the middle of what stands there on a batch."""
        assert self.config.decoder_bias is not None
        tokens = self.on_device(tokens)
        _, acts = self.model.forward_raw(tokens, run_entire_model=False)
        for position, sae in self.saes.items():
            act = acts[position].flatten(start_dim=2)
            if self.kept is not None:
                act = act[self.kept(tokens)]
            set_decoder_bias(sae, act, self.config.decoder_bias)

    def evaluate(self, sink: Sink) -> Evaluation | None:
        """Judge the SAEs on held-out text, once as they are. None: there is no such text."""
        if not self.eval_batches:
            return None
        n_samples, evaluation = self.last_evaluation
        is_new = n_samples != self.n_samples
        if is_new or evaluation is None:
            evaluation = evaluate(self.model, self.eval_batches, kept=self.kept)
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
            "coefficients": self.coefficients.state_dict(),
            "dead": self.dead and self.dead.state_dict(),
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
        self.coefficients.load_state_dict(state["coefficients"])
        if self.dead is not None:
            self.dead.load_state_dict(state["dead"])
        # It is asked after optimizer steps alone, and the checkpoint may lie between two.
        n_stepped = self.n_samples - self.n_samples % self.config.samples_per_step
        self.resampling = Every(self.resampling.period, n_stepped)
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


def train_metrics(loss: Tensor, terms: dict[str, Tensor], passes: Passes) -> dict[str, float]:
    """Numbers of one batch, under the names that are logged; terms without their coefficients."""
    metrics = {"loss": loss.item()}
    metrics |= {f"loss/train/{name}": value.item() for name, value in terms.items()}
    for position, acts in passes.sae_acts.items():
        l0 = (acts.c != 0).sum(dim=-1).float().mean()
        metrics[f"sparsity/train/L_0/{position}"] = l0.item()
    return metrics
