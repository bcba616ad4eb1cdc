"""A grid of runs, in a file that is also a sweep definition of Weights & Biases.

    program: sparsify/scripts/train_tlens_saes/run_train_tlens_saes.py
    method: grid
    command: ["${env}", "${interpreter}", "${program}", RECIPE.yaml, "${args}"]
    parameters:
      loss.sparsity.coeff: {values: [1, 2, 4]}
      seed: {values: [0, 1, 2]}

`RECIPE.yaml` is what all runs share. Paths are relative to the folder from which the command runs.
"""

import itertools
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from sparsify.base_config import (
    BaseConfig,
    Count,
    Name,
    UserError,
    load_config,
    read_yaml,
    validate_config,
)
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.scripts.train_tlens_saes.jobs import Job

PROGRAM = "run_train_tlens_saes.py"
MACROS = ("${env}", "${interpreter}", "${program}", "${args}")


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
        return self

    @property
    def choices(self) -> list[Any]:  # of any setting
        """The values, of which there is at least one."""
        return [self.value] if self.values is None else self.values


class SweepConfig(BaseConfig):
    """Runs of one recipe with all combinations of some settings."""

    program: Path
    """The script that trains: run_train_tlens_saes.py."""
    method: Literal["grid"]
    """All combinations."""
    command: list[str]
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
        if self.program.name != PROGRAM:
            raise ValueError(f"program ({self.program}) must be the path of {PROGRAM}")
        if not self.recipe_arguments or self.recipe_arguments[0].startswith(("-", "$")):
            example = ", ".join([*MACROS[:3], "RECIPE.yaml", MACROS[3]])
            raise ValueError(f"command ({self.command}) must name a recipe: [{example}]")
        return self

    @property
    def recipe_arguments(self) -> list[str]:
        """The recipe and what else all runs are given."""
        return [part for part in self.command if part not in MACROS]


def load_sweep(path: Path) -> list[Job]:
    """The runs of a sweep file. The last of its settings changes fastest.

    Raises:
        UserError: The file, its recipe or the settings of a run are not valid.
    """
    sweep = validate_config(SweepConfig, read_yaml(path), str(path))
    choices = [parameter.choices for parameter in sweep.parameters.values()]
    jobs = []
    for values in itertools.product(*choices):
        settings = dict(zip(sweep.parameters, values, strict=True))
        options = [f"--{name}={_as_text(value)}" for name, value in settings.items()]
        varied = [
            option.removeprefix("--")
            for option, of in zip(options, choices, strict=True)
            if len(of) > 1
        ]
        label = " ".join([path.stem, *varied])
        arguments = [*sweep.recipe_arguments, *options]
        try:
            jobs.append(Job(label, arguments, load_config(Config, arguments, "")))
        except UserError as error:
            raise UserError(f"{path}: {label}: {error}") from None
    return jobs


def _as_text(value: Any) -> str:  # of any setting
    return value if isinstance(value, str) else json.dumps(value)
