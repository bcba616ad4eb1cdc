"""A run of `trainer.Trainer`, from its folder to its result."""

import json
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from sparsify.evaluation.table import format_table
from sparsify.runs.checkpoints import Checkpoint
from sparsify.runs.disk import check_disk_at_start
from sparsify.runs.interrupt import held_interrupt, interrupt_says
from sparsify.runs.plots import plot_training
from sparsify.runs.resume import (
    checkpoint_to_go_on_from,
    clear_what_came_after,
    explained_misfit,
    folder_to_write_to,
    resume_line,
)
from sparsify.runs.run_folder import (
    METRICS_FILE,
    RESULT_FILE,
    check_save_dir,
    create_run_folder,
    held_run_folder,
    write_config,
    write_text,
)
from sparsify.runs.saved import check_identity, model_identity
from sparsify.runs.saver import CheckpointSaver
from sparsify.runs.sink import Sink
from sparsify.runs.sinks import open_sinks, report_early_end
from sparsify.runs.weight_files import load_metadata, weights_path
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.scripts.train_tlens_saes.parts import open_parts
from sparsify.scripts.train_tlens_saes.trainer import Trainer
from sparsify.settings.base_config import UserError
from sparsify.training.memory import (
    explained_out_of_memory,
    format_estimate,
)

KEPT_SETTINGS = (
    "tlens_model_name",
    "tlens_model_path",
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
"""What a run goes on with as it was."""


def train_saes(config: Config) -> None:
    """Train SAEs as `config` says, judge them, and leave a run folder that can be loaded."""
    trainer = start(config) if config.resume is None else go_on(config)
    run_dir = trainer.run_dir
    try:
        with (
            trainer.held,
            open_sinks(
                config,
                run_name=config.run_name,
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
        trainer.run_dir = create_run_folder(config.save_dir, config.run_name)
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
        write_text(run_dir / RESULT_FILE, json.dumps(evaluation.to_json(), indent=1) + "\n")
    plot_training(run_dir)
    print(
        "\nLoad the result:\n\n"
        "  from sparsify import SAETransformer\n"
        f'  model = SAETransformer.from_local_path("{run_dir}")\n'
        '  logits, acts = model(model.to_tokens("def main("))\n'
    )
