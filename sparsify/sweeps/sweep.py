"""A grid of runs, in a file that is also a sweep definition of Weights & Biases.

    program: sparsify/scripts/train_tlens_saes/run_train_tlens_saes.py
    method: grid
    command: ["${env}", "${interpreter}", "${program}", RECIPE.yaml, "${args}"]
    parameters:
      loss.sparsity.coeff: {values: [1, 2, 4]}
      seed: {values: [0, 1, 2]}

`RECIPE.yaml` is what all runs share; further arguments may follow it. Paths are relative to the
folder in which the command runs. For `wandb sweep` the runs must set `wandb_project`, in the
recipe or as an argument.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from sparsify.settings.base_config import (
    BaseConfig,
    Count,
    Name,
    UserError,
    read_yaml,
    validate_config,
)
from sparsify.settings.command_line import load_config
from sparsify.sweeps.jobs import Job, Script

PROGRAM_MACRO, ARGS_MACRO = "${program}", "${args}"


class Parameter(BaseConfig):
    """What one setting is in the runs of a grid."""

    value: Any = None  # of any setting
    """The same in all runs."""
    values: list[Any] | None = None  # of any setting
    """Each of these."""

    @model_validator(mode="after")
    def _has_values(self) -> Self:
        if len(self.model_fields_set) != 1 or self.values == []:
            raise ValueError("give either value, or values with at least one entry")
        for value in self.choices:
            if value is None or isinstance(value, dict | list):
                raise ValueError(
                    f"{value} is not passed on as it is by Weights & Biases; give numbers and "
                    "names here, and what all runs share in command, as in --max_grad_norm=null"
                )
        return self

    @property
    def choices(self) -> list[Any]:  # of any setting
        """The values, of which there is at least one."""
        return [self.value] if self.values is None else self.values


class SweepConfig(BaseConfig):
    """Runs of one recipe with all combinations of some settings."""

    program: Path
    """The script that trains, such as run_train_tlens_saes.py."""
    method: Literal["grid"]
    """All combinations."""
    command: list[Name]
    """As Weights & Biases has it: macros, and between ${program} and ${args} the recipe, with
    further arguments if there are any."""
    parameters: dict[str, Parameter]
    """Values by the dotted name of a setting."""

    name: Name | None = None
    """Of the sweep, for Weights & Biases alone, like all that follows."""
    description: str | None = None
    """What it is for."""
    project: Name | None = None
    """Where it belongs."""
    entity: Name | None = None
    """Whose it is."""
    metric: dict[str, Any] | None = None  # as Weights & Biases defines it
    """What to compare."""
    run_cap: Count | None = None
    """Runs after which it ends."""

    @model_validator(mode="after")
    def _command_runs_a_recipe(self) -> Self:
        has_macros = PROGRAM_MACRO in self.command and self.command[-1] == ARGS_MACRO
        if not has_macros or not self.recipe_arguments or self.recipe_arguments[0][0] in "-$":
            raise ValueError(
                f"command ({self.command}) must name a recipe and hand on the settings of a run: "
                f"[${{env}}, ${{interpreter}}, {PROGRAM_MACRO}, RECIPE.yaml, {ARGS_MACRO}]"
            )
        return self

    @property
    def recipe_arguments(self) -> list[str]:
        """The recipe and what else all runs are given."""
        return self.command[self.command.index(PROGRAM_MACRO) + 1 : -1]


def load_sweep(path: Path, scripts: Iterable[Script]) -> list[Job]:
    """Return the runs of a sweep file. The last of its settings changes fastest.

    Args:
        path: The file.
        scripts: The scripts that it may name as its program, known by their file name.

    Raises:
        UserError: The file, its recipe or the settings of a run are not valid.
    """
    sweep = validate_config(SweepConfig, read_yaml(path), str(path))
    by_name = {script.program.name: script for script in scripts}
    if (script := by_name.get(sweep.program.name)) is None:
        raise UserError(
            f"{path}: program ({sweep.program}) must be the path of {' or '.join(by_name)}"
        )
    if not (recipe := Path(sweep.recipe_arguments[0])).is_file():
        raise UserError(
            f"{path}: command: there is no recipe '{recipe}' in '{Path.cwd()}'; run the command in "
            "the folder that this path is relative to"
        )
    choices = [parameter.choices for parameter in sweep.parameters.values()]
    jobs = []
    for values in itertools.product(*choices):
        settings = dict(zip(sweep.parameters, values, strict=True))
        options = [f"--{name}={value}" for name, value in settings.items()]
        varied = [
            option.removeprefix("--")
            for option, of in zip(options, choices, strict=True)
            if len(of) > 1
        ]
        label = " ".join([path.stem, *varied])
        arguments = [*sweep.recipe_arguments, *options]
        try:
            config = load_config(script.config, arguments, "")
        except UserError as error:
            raise UserError(f"{path}: {label}: {error}") from None
        jobs.append(Job(label, script, arguments, config))
    return jobs
