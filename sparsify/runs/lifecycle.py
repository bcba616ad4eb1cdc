"""The life of a training run: opened, started or resumed, trained, saved, finished, cleaned up.

It is the same for all kinds of run; what differs is behind `TrainingRun`.
"""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sparsify.runs.bad_batch import BAD_BATCHES
from sparsify.runs.checkpoints import Checkpoint
from sparsify.runs.console import say
from sparsify.runs.disk import check_disk_at_start
from sparsify.runs.interrupt import held_interrupt, interrupt_says
from sparsify.runs.resume import (
    checkpoint_to_resume,
    clear_what_came_after,
    describe_resumption,
    explained_misfit,
    find_run,
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
from sparsify.runs.session import Session
from sparsify.runs.sinks import open_sinks, report_early_end
from sparsify.runs.training_run import TrainingRun
from sparsify.runs.weight_files import check_identity, load_metadata, weights_path
from sparsify.settings.base_config import UserError
from sparsify.settings.terminal import report
from sparsify.training.memory import explained_out_of_memory
from sparsify.training.random_state import set_seed

AnyRun = TrainingRun[Any]  # whatever its batches are


def run_training(run: AnyRun) -> None:
    """Do a run, or resume one, as its config says.

    Raises:
        UserError: Something that a person can change keeps it from starting or ending. A new folder
            in which nothing is worth keeping is gone then.
        KeyboardInterrupt: It was interrupted, after it has been saved.
    """
    assert run.run_dir is None, "each run is done once; make another for the next"
    assert run.n_samples == 0, "each run is done once; make another for the next"
    new_folders: list[Path] = []
    try:
        with ExitStack() as held:
            if run.config.resume is None:
                new_folders += _start(run, held)
            else:
                _resume(run, held)
            held.callback(run.loader.close)
            _train_and_finish(run)
    except UserError:
        # No step was taken, and no batch kept for somebody to look at.
        for folder in new_folders:
            if run.n_samples == 0 and not any(folder.glob(BAD_BATCHES)):
                shutil.rmtree(folder)
        raise


def _start(run: AnyRun, held: ExitStack) -> list[Path]:
    """Open a new run, then make its folder, which is returned if there is one."""
    config = run.config
    if config.save_dir is not None:
        check_save_dir(config.save_dir)
    _open(run)
    check_disk_at_start(config, run.trained, run.stepper.parameters)
    if config.save_dir is None:
        return []
    run.run_dir = folder = create_run_folder(config.save_dir, config.run_name)
    held.enter_context(held_run_folder(folder))
    write_config(folder, config)
    run.on_folder(folder)
    say(f"run folder: {folder}")
    return [folder]


def _resume(run: AnyRun, held: ExitStack) -> None:
    """Open a run again at the checkpoint that its config means."""
    # "newest" means one run from here on, whatever else is written meanwhile.
    assert run.config.resume is not None
    path = find_run(run.config.resume, run.config.save_dir, type(run.config))
    run.config = config = run.config.model_copy(update={"resume": path})
    held.enter_context(held_run_folder(folder_to_write_to(config)))
    checkpoint = find_checkpoint(run)
    # The config that is kept is one from which the whole run can be repeated.
    run.config = config.model_copy(update={"resume": None})
    run.run_dir = checkpoint.run_dir
    _open(run)
    with explained_misfit(checkpoint):
        run.resume(checkpoint)
    check_disk_at_start(config, run.trained, run.stepper.parameters, run.n_samples)
    clear_what_came_after(checkpoint, checkpoint.run_dir / METRICS_FILE)
    say(describe_resumption(run.config, checkpoint))  # with the old values, before they are gone
    write_config(checkpoint.run_dir, run.config)


def find_checkpoint(run: AnyRun) -> Checkpoint:
    """Return what `resume` of a run's config means, if the weights belong to what is opened."""
    checkpoint = checkpoint_to_resume(run.config, run.kept_settings)
    weights = weights_path(checkpoint.run_dir, checkpoint.n_samples)
    check_identity(weights, load_metadata(weights), run.identity())
    return checkpoint


def _open(run: AnyRun) -> None:
    set_seed(run.config.seed)
    for step in run.opening_steps():
        say(f"{step.name}: {step.run()}")
    run.build()


def _train_and_finish(run: AnyRun) -> None:
    config, run_dir = run.config, run.run_dir
    line = "nothing was saved" if run_dir is None else resume_line(run_dir)
    with (
        open_sinks(
            config,
            run_name=config.run_name,
            run_dir=run_dir,
            items_per_sample=run.items_per_sample,
            item=run.item,
            start=run.n_samples,
        ) as sink,
        CheckpointSaver(run_dir, config.keep_last, sink, run.identity(), run.n_samples) as saver,
    ):
        with held_interrupt(line) as is_interrupted, explained_out_of_memory(run.memory_remedies):
            session = Session(run, sink, saver, is_interrupted)
            run.train(session)
            saver.finish(session.save)
        with interrupt_says(line), explained_out_of_memory(run.memory_remedies):
            report_early_end(sink, run.n_samples, config.n_batches * config.batch_size, run.subject)
            result = run.finish(session)
    # Below the progress bar, which is closed by now.
    report(result)
