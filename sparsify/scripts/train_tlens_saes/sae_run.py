"""A run that trains SAEs inside a language model: its parts, its loop, its result."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsify.evaluation.evaluate import evaluate
from sparsify.evaluation.results import Evaluation
from sparsify.evaluation.table import format_table
from sparsify.losses.loss import why_dense
from sparsify.losses.passes import Passes
from sparsify.runs.console import say
from sparsify.runs.plots import plot_training
from sparsify.runs.run_folder import write_result
from sparsify.runs.saved import add_saes, load_model, model_identity
from sparsify.runs.session import Session
from sparsify.runs.text import (
    check_tokenizers,
    describe_text,
    kept_tokens,
    on_device,
    open_text,
    seen_in_training,
    take_eval_batches,
)
from sparsify.runs.training_run import OpeningStep, TrainingRun
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.settings.base_config import UserError
from sparsify.tlens.loading import resolve_device
from sparsify.training.compilation import compile_kernels
from sparsify.training.decoder_bias import set_decoder_bias
from sparsify.training.firing_windows import FiringWindows
from sparsify.training.forward_passes import forward_passes
from sparsify.training.forward_plan import derive_plan
from sparsify.training.precision import set_precision
from sparsify.training.sae_trainer import SAEBatchLoss, SAETrainer


class SAERun(TrainingRun[Tensor]):
    """SAEs trained inside a frozen language model, on batches of token ids."""

    kept_settings = (
        "tlens_model_name",
        "tlens_model_processing",
        "saes",
        "loss",
        "decoder_bias",
        "dead_elements",
        "resampling",
        "ignored_tokens",
        "train_data",
        "seed",
        "batch_size",
        "effective_batch_size",
        "lr",
    )
    memory_remedies: ClassVar[str] = (
        "batch_size (keep effective_batch_size), train_data.n_ctx, saes.dict_size_to_input_ratio, "
        "or the number of saes.sae_positions"
    )
    subject: ClassVar[str] = "the SAEs were"
    weights_step: ClassVar[str] = "SAEs"
    config: Config

    def train(self, session: Session[Tensor]) -> None:
        """Train the SAEs on the batches of a session: the loop."""
        self.set_training_mode()
        if self.n_samples == 0:
            session.log(self.evaluate())
        for tokens in session.batches():
            if self.n_samples == 0:
                self.set_decoder_biases(tokens)
            due = session.due_after(tokens)
            loss = self.batch_loss(tokens)
            session.check(loss, tokens, due)
            self.learn_from(loss, tokens)
            session.count(tokens)

            if due.log:
                session.log(self.trainer.metrics(loss))
            session.log(self.firing.update(loss.passes, self.n_samples))
            if due.evaluate:
                session.log(self.evaluate())
            if due.save:
                self.trainer.fit()
                session.save()
        self.trainer.fit()  # for the last checkpoint, which is saved next

    def batch_loss(self, batch: Tensor) -> SAEBatchLoss:
        """Return the loss of a batch of tokens."""
        return self.trainer.batch_loss(batch)

    def learn_from(self, loss: SAEBatchLoss, batch: Tensor) -> None:
        """Take a batch's gradient, and an optimizer step if one is due; count who fires."""
        self.trainer.learn_from(loss, len(batch))

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of held-out text, or nothing if they are logged already."""
        if not self.eval_batches or self.n_samples_evaluated == self.n_samples:
            return {}
        self.trainer.fit()
        self.n_samples_evaluated = self.n_samples
        self.evaluation = evaluate(self.model, self.eval_batches, kept=self.kept)
        return self.evaluation.metrics()

    def finish(self, session: Session[Tensor]) -> str:
        """Evaluate the SAEs, write the result, and return what came out and how to load it."""
        session.log(self.evaluate())
        if self.evaluation is None and self.eval_batches:  # resumed at its end
            self.evaluation = evaluate(self.model, self.eval_batches, kept=self.kept)
        report = []
        if self.evaluation is not None:
            report.append(format_table(self.evaluation))
        if self.run_dir is not None:
            if self.evaluation is not None:
                write_result(self.run_dir, self.evaluation.to_json())
            plot_training(self.run_dir)
            report.append(
                "\nLoad the result:\n\n"
                "  from sparsify import SAETransformer\n"
                f'  model = SAETransformer.from_local_path("{self.run_dir}")\n'
                '  logits, acts = model("def main(")\n'
            )
        return "\n".join(report)

    # What is opened

    def opening_steps(self) -> list[OpeningStep]:
        """Return the steps that open model, SAEs, loss and text."""
        return [
            OpeningStep("model", self.open_model),
            OpeningStep("SAEs", self.open_saes, needs=("model",)),
            OpeningStep("loss", self.open_loss, needs=("SAEs",)),
            OpeningStep("tokenizer", self.open_tokenizers, needs=("model",)),
            OpeningStep("train_data", self.open_train_data, needs=("tokenizer",)),
            OpeningStep("eval_data", self.open_eval_data, needs=("tokenizer",)),
        ]

    def open_model(self) -> str:
        """Load the language model."""
        config = self.config
        device = resolve_device(config.device)
        self.tlens_model = load_model(config, device)
        cfg = self.tlens_model.cfg
        return (
            f"{config.tlens_model_name or config.tlens_model_path}: {cfg.n_layers} blocks of width "
            f"{cfg.d_model}, context {cfg.n_ctx:,}, vocabulary {cfg.d_vocab:,}, on {device}"
        )

    def open_saes(self) -> str:
        """Put SAEs, new or loaded, into the model."""
        config = self.config
        self.model = model = add_saes(self.tlens_model, config)
        set_precision(model, config.mixed_precision)
        if config.compile:
            compile_kernels(model)
        self.saes = {name: model.saes.at(name) for name in model.raw_sae_positions}
        target = config.loss.sparsity.target_l0 if config.loss.sparsity else None
        for position, sae in self.saes.items():
            if target is not None and target > sae.n_dict:
                raise UserError(
                    f"loss.sparsity.target_l0 ({target:g}) is above the number of dictionary "
                    f"elements at '{position}', {sae.n_dict}; lower it"
                )
        shown = [f"{name} ({s.n_dict:,} elements of {s.d_act:,})" for name, s in self.saes.items()]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        n_trained = sum(p.numel() for p in model.saes.parameters() if p.requires_grad)
        if n_trained == 0:
            raise UserError(
                "saes.retrain_saes: false leaves nothing to train, since all SAEs come from "
                "pretrained_sae_paths; set it to true"
            )
        return f"{', '.join(shown[:3])}{more}: {n_trained:,} parameters to train"

    def open_loss(self) -> str:
        """Derive what a step computes from the loss."""
        hooked = self.model.hooked_model
        if self.config.eval_data is not None:
            hooked.check_unembedding()
        self.plan = plan = derive_plan(self.model, self.config.loss)
        if (reason := why_dense(self.config.loss, self.config.saes)) is not None:
            say(f"warning: {reason}")
        terms = " + ".join(self.config.loss.terms())
        last = max(plan.raw_stop, plan.spliced_stop)
        end = f"of {hooked.n_blocks} blocks, {last} are run"
        if plan.is_local:
            return f"{terms}: a local mix; {end}"
        return f"{terms}; {end}, the first {plan.start} once for both passes"

    def open_tokenizers(self) -> str:
        """Check the tokenizers of the text."""
        self.kept = kept_tokens(self.config, self.tlens_model)
        return check_tokenizers(self.config, self.tlens_model)

    def open_train_data(self) -> str:
        """Open the text to train on."""
        data = self.config.train_data
        self.loader = open_text(self.config, data, self.tlens_model)
        return describe_text(self.config, data, self.loader, is_counted=self.is_trial)

    def open_eval_data(self) -> str:
        """Load the held-out text."""
        data = self.config.eval_data
        if data is None:
            self.eval_batches = []
            return "null: there is no evaluation"
        if (warning := seen_in_training(self.config)) is not None:
            say(f"warning: {warning}")
        loader = open_text(self.config, data, self.tlens_model)
        self.eval_batches = take_eval_batches(self.config, loader, self.tlens_model)
        n_samples = sum(map(len, self.eval_batches))
        name = f"{data.dataset_name} {data.split}"
        wanted = f"eval_n_samples {self.config.eval_n_samples:,}"
        return f"{name}: {n_samples:,} samples, {wanted} ({loader.found})"

    def build(self) -> None:
        """Make what trains the SAEs."""
        config = self.config
        self.trainer = SAETrainer(
            self.saes,
            self.forward,
            config.loss,
            config,
            dead_elements=config.dead_elements,
            resampling=config.resampling,
        )
        self.stepper = self.trainer.stepper
        self.firing = FiringWindows(
            self.saes, config.collect_act_frequency_every_n_samples, config.act_frequency_n_tokens
        )
        self.evaluation: Evaluation | None = None
        self.n_samples_evaluated: int | None = None

    def forward(self, tokens: Tensor) -> Passes:
        """Return the passes of a batch, as far as its tokens count."""
        tokens = on_device(tokens, self.model.device)
        passes = forward_passes(self.model, tokens, self.plan)
        return passes if self.kept is None else passes.only(self.kept(tokens))

    def set_training_mode(self) -> None:
        """Set SAEs to training mode, but frozen ones as they are used."""
        self.model.train()
        for sae in self.saes.values():
            sae.train(sae.is_trained)

    def set_decoder_biases(self, tokens: Tensor) -> None:
        """Set the decoders' biases to the middle of a batch's activations, where configured."""
        if self.config.decoder_bias is None:
            return
        tokens = on_device(tokens, self.model.device)
        _, acts = self.model.forward_raw(tokens, run_entire_model=False)
        for position, sae in self.saes.items():
            act = acts[position].flatten(start_dim=2)
            act = act if self.kept is None else act[self.kept(tokens)]
            set_decoder_bias(sae, act, self.config.decoder_bias)

    # What the library asks

    @property
    def trained(self) -> torch.nn.Module:
        """The SAEs."""
        return self.model.saes

    @property
    def items_per_sample(self) -> int:
        """Tokens in a sequence."""
        return self.config.train_data.n_ctx

    @property
    def is_watched(self) -> bool:
        """Return whether every loss is checked: on a CPU."""
        return self.trainer.is_watched

    def identity(self) -> dict[str, str]:
        """Return which model the SAEs belong to."""
        return model_identity(self.config)

    def tensors_of(self, batch: Tensor) -> dict[str, Tensor]:
        """Return the tokens."""
        return {"tokens": batch}

    def state_dict(self) -> dict[str, Any]:  # of several types
        """Return the state of firing counts, coefficients, dead elements and evaluations."""
        state = {"firing": self.firing.state_dict(), **self.trainer.state_dict()}
        return {**state, "n_samples_evaluated": self.n_samples_evaluated}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned after `n_samples`."""
        self.n_samples_evaluated = state["n_samples_evaluated"]
        self._check_recent(state["recent"])
        self.firing.load_state_dict(state["firing"], self.n_samples)
        self.trainer.load_state_dict(state, self.n_samples)

    def _check_recent(self, batches: list[Tensor]) -> None:
        """Raise a `ValueError` if recent batches of a state are not batches of this run."""
        shape = (self.config.batch_size, self.config.train_data.n_ctx)
        n_ids = self.tlens_model.cfg.d_vocab
        for tokens in batches:
            if tokens.shape != shape or tokens.dtype != torch.int64:
                raise ValueError(f"a recent batch is {tuple(tokens.shape)}, {tokens.dtype}")
            if tokens.min() < 0 or tokens.max() >= n_ids:
                raise ValueError(f"a recent batch holds ids beyond the vocabulary of {n_ids}")
