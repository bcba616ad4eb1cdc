"""A run that trains an SAE on vectors in memory, with all that such a run counts."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsify.data.batches import TensorBatches
from sparsify.losses.loss import LossConfig
from sparsify.losses.passes import Passes
from sparsify.runs.run_folder import write_result
from sparsify.runs.session import Session
from sparsify.runs.training_run import OpeningStep, TrainingRun
from sparsify.saes.base import SAE
from sparsify.saes.relu import ReLUSAE
from sparsify.training.config import DeadElementsConfig, ResamplingConfig, TrainingConfig
from sparsify.training.firing_windows import FiringWindows
from sparsify.training.sae_trainer import SAETrainer

HERE = "here"
N_DONE = 20
"""Samples of the run that is resumed: five batches, so in the middle of the third step."""


class SAERun(TrainingRun[tuple[Tensor, ...]]):
    """SAEs on vectors in memory, with all that a run of SAEs counts."""

    kept_settings = ("seed", "batch_size", "lr")
    weights_step: ClassVar[str] = "saes"
    saes: dict[str, SAE]

    def train(self, session: Session[tuple[Tensor, ...]]) -> None:
        for batch in session.batches():
            due = session.due_after(batch)
            loss = self.batch_loss(batch)
            session.check(loss, batch, due)
            self.trainer.learn_from(loss, len(batch[0]))
            metrics = self.firing.update(loss.passes, self.n_samples)
            session.count(batch)
            session.log({"loss": loss.total.item(), **metrics})
            if due.save:
                session.save()

    def batch_loss(self, batch: tuple[Tensor, ...]) -> Any:  # of passes too
        return self.trainer.batch_loss(batch)

    def finish(self, session: Session[tuple[Tensor, ...]]) -> str:
        assert self.run_dir is not None
        write_result(self.run_dir, {"metrics": {}})
        return "done"

    def opening_steps(self) -> list[OpeningStep]:
        return [OpeningStep("saes", self.open_all)]

    def open_all(self) -> str:
        self.saes = {HERE: ReLUSAE(3, 6)}
        self.loader = TensorBatches(
            torch.randn(40, 3), batch_size=4, seed=self.config.seed, n_epochs=None
        )
        return "one"

    def passes(self, batch: tuple[Tensor, ...]) -> Passes:
        (x,) = batch
        return Passes({HERE: x}, {HERE: self.saes[HERE](x)}, saes=self.saes)

    def build(self) -> None:
        losses = LossConfig.model_validate(
            {"out_to_in": {"coeff": 1.0}, "sparsity": {"coeff": 0.1, "target_l0": 2.0}}
        )
        self.trainer = SAETrainer(
            self.saes,
            self.passes,
            losses,
            self.config,
            dead_elements=DeadElementsConfig(after_n_tokens=6, min_density=0.1),
            resampling=ResamplingConfig(every_n_samples=8, until_n_samples=100),
        )
        self.stepper = self.trainer.stepper
        self.firing = FiringWindows(self.saes, 8, 6)

    @property
    def trained(self) -> nn.Module:
        return self.saes[HERE]

    def tensors_of(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"vectors": batch[0]}

    def state_dict(self) -> dict[str, Any]:
        return {"firing": self.firing.state_dict(), **self.trainer.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        self.firing.load_state_dict(state["firing"], self.n_samples)
        self.trainer.load_state_dict(state, self.n_samples)


def sae_run_config(folder: Path, **settings: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "n_samples": 32,
            "batch_size": 4,
            "effective_batch_size": 8,
            "lr": 0.1,
            "lr_schedule": "cosine",
            "save_every_n_samples": N_DONE,
            "save_dir": folder,
            **settings,
        }
    )
