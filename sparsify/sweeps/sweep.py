"""Files that list many runs of one recipe.

A grid is all combinations of some settings:

    recipe: RECIPE.yaml
    parameters:
      loss.sparsity.coeff: {values: [1, 2, 4]}
      seed: {values: [0, 1, 2]}

Runs that are not a grid have names, and each says what it changes in the recipe. With `parameters`,
each of them is trained with all combinations:

    recipe: RECIPE.yaml
    runs:
      e2e:
      local: {loss.logits_kl: null, loss.out_to_in.coeff: 1}
    parameters:
      seed: {values: [0, 1, 2]}

`program`, the path of the script that trains, is needed only where it does not train SAEs. Paths
are relative to the folder in which the command runs.

A grid is a valid W&B sweep file if it has `program`, `method` and `command` in place of `recipe`:

    program: sparsify/scripts/train_tlens_saes/run_train_tlens_saes.py
    method: grid
    command: ["${env}", "${interpreter}", "${program}", RECIPE.yaml, "${args}"]
    parameters: ...

Arguments that all runs share may follow the recipe there. For `wandb sweep` the runs must set
`wandb_project`, in the recipe or as an argument. `parameters` may also be nested as in W&B, and
`${args}` may be missing as in files for scripts that read `wandb.config`; `wandb sweep` could not
pass the settings of such files on to the scripts here.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from sparsify.settings.base_config import (
    TRUST,
    BaseConfig,
    Count,
    Name,
    UserError,
    not_from_a_file,
    read_yaml,
    validate_config,
)
from sparsify.settings.command_line import load_config
from sparsify.settings.paths import UserPath
from sparsify.sweeps.jobs import Job, Script

PROGRAM_MACRO, ARGS_MACRO = "${program}", "${args}"

Options = dict[str, list[str]]
"""Parts of a command line by the setting that they belong to: `lr: [--lr, 0.1]`."""


class Parameter(BaseConfig):
    """The values of one setting in the runs of a grid."""

    value: Any = None  # of any setting
    """The same in all runs."""
    values: list[Any] | None = None  # of any setting
    """Each of these."""
    parameters: "dict[str, Parameter] | None" = None
    """The settings that this one holds."""

    @model_validator(mode="after")
    def _has_values(self) -> Self:
        is_empty = self.values == [] or self.parameters == {}
        if len(self.model_fields_set) != 1 or is_empty:
            raise ValueError("give either value, or values with at least one entry")
        if any(isinstance(value, dict) for value in [self.value, *(self.values or [])]):
            raise ValueError("give the settings inside by their dotted names")
        return self

    def choices(self, name: str) -> Iterator[tuple[str, list[Any]]]:  # of any setting
        """Yield the values of setting `name`, or of those that it holds, by their dotted names."""
        if self.parameters is None:
            yield name, [self.value] if self.values is None else self.values
        for key, parameter in (self.parameters or {}).items():
            yield from parameter.choices(f"{name}.{key}")


class SweepConfig(BaseConfig):
    """Runs of one recipe with all combinations of some settings."""

    recipe: UserPath | None = None
    """The settings that all runs share. null: named in command."""
    runs: dict[Name, dict[str, Any] | None] | None = None  # of any setting
    """Changes of the recipe, if any, by the name of a run. null: there are only parameters."""
    parameters: dict[str, Parameter] = {}
    """Values by the dotted name of a setting."""

    program: Path | None = None
    """The script that trains. null: the one that trains SAEs."""
    method: Literal["grid"] = "grid"
    """All combinations."""
    command: list[Name] | None = None
    """As W&B has it: macros, and after ${program} the recipe, with further arguments if there are
    any. null: there is a recipe."""

    name: Name | None = None
    """Name of the sweep. It is for W&B alone, like all that follows."""
    description: str | None = None
    """Purpose."""
    project: Name | None = None
    """Project that it belongs to."""
    entity: Name | None = None
    """Owner."""
    metric: dict[str, Any] | None = None  # as W&B defines it
    """Metric to compare runs by."""
    run_cap: Count | None = None
    """Runs after which it ends."""

    @model_validator(mode="after")
    def _there_is_a_recipe(self) -> Self:
        if (self.recipe is None) == (self.command is None):
            raise ValueError("give either recipe, or command with the recipe in it, and not both")
        if not self.parameters and not self.runs:
            raise ValueError("give parameters or runs, in which the runs differ")
        if self.command is not None and self.runs is not None:
            raise ValueError("runs do not go with command; name the recipe in recipe instead")
        return self

    @model_validator(mode="after")
    def _command_runs_a_recipe(self) -> Self:
        if self.command is None:
            return self
        arguments = self.recipe_arguments if PROGRAM_MACRO in self.command else []
        if not arguments or arguments[0][0] in "-$" or ARGS_MACRO in arguments:
            raise ValueError(
                f"command ({self.command}) must name a recipe and pass on the settings of a run: "
                f"[${{env}}, ${{interpreter}}, {PROGRAM_MACRO}, RECIPE.yaml, {ARGS_MACRO}]"
            )
        return self

    @model_validator(mode="after")
    def _wandb_passes_on_all_values(self) -> Self:
        is_passed_on = self.command is not None and self.command[-1] == ARGS_MACRO
        for value in itertools.chain(*self.choices.values()):
            if is_passed_on and (value is None or isinstance(value, list)):
                raise ValueError(
                    f"parameters: {value} is not passed on as it is by W&B; give numbers and names "
                    "here, and what all runs share in command, as in --max_grad_norm=null"
                )
        return self

    @property
    def recipe_arguments(self) -> list[str]:
        """The recipe and the arguments that all runs share."""
        if self.command is None:
            return [str(self.recipe)]
        after = self.command[self.command.index(PROGRAM_MACRO) + 1 :]
        return after[:-1] if after[-1:] == [ARGS_MACRO] else after

    @property
    def choices(self) -> dict[str, list[Any]]:  # of any setting
        """The values of each parameter by its dotted name."""
        items = self.parameters.items()
        return dict(itertools.chain(*(parameter.choices(name) for name, parameter in items)))

    @property
    def changes(self) -> dict[str, dict[str, Any]]:  # of any setting
        """The changes of each run by dotted names. There is at least one run."""
        return {name: dict(_flat(run or {})) for name, run in (self.runs or {"": {}}).items()}


def load_sweep(path: Path, scripts: Iterable[Script], overrides: Sequence[str] = ()) -> list[Job]:
    """Return the runs of a sweep file. The last of its parameters changes fastest.

    Args:
        path: The file.
        scripts: The scripts that it may name as its program, known by their file name. The first
            one is used where it names none.
        overrides: Options of the script that all runs are given, such as `--n_samples 800`.

    Raises:
        UserError: The file, its recipe or the settings of a run are not valid.
    """
    sweep = validate_config(SweepConfig, read_yaml(path), str(path))
    script = _script_of(sweep, path, scripts)
    recipe, *shared = sweep.recipe_arguments
    if not Path(recipe).is_file():
        raise UserError(
            f"{path}: {'command' if sweep.command else 'recipe'}: there is no recipe '{recipe}' in "
            f"'{Path.cwd()}'; run the command in the folder that this path is relative to"
        )
    choices, overriding = sweep.choices, options_of(overrides)
    varied = [name for name, values in choices.items() if len(values) > 1]
    jobs = []
    for name, changes in sweep.changes.items():
        if twice := [key for key in changes if key in choices]:
            raise UserError(f"{path}: runs.{name}: {twice[0]} is in parameters too; remove one")
        if lost := [key for key in overriding if key in varied or key in changes]:
            raise UserError(f"--{lost[0]}: differs between the runs of {path}; change it there")
        for values in itertools.product(*choices.values()):
            settings = dict(zip(choices, values, strict=True))
            label = [path.stem, name, *(f"{key}={settings[key]}" for key in varied)]
            options = options_of(shared)
            options |= {key: [_option(key, value)] for key, value in (changes | settings).items()}
            if any(o.startswith(f"--{TRUST}") for o in itertools.chain(*options.values())):
                raise UserError(f"{path}: {not_from_a_file()}")
            options |= overriding
            arguments = [recipe, *itertools.chain(*options.values())]
            jobs.append(_checked_job(path, " ".join(filter(None, label)), script, arguments))
    return jobs


def options_of(arguments: Sequence[str]) -> Options:
    """Return the parts of a command line by the setting that they belong to.

    Raises:
        UserError: It does not begin with an option.
    """
    options: Options = {}
    key = None
    for argument in arguments:
        if argument.startswith("--"):
            key = argument.removeprefix("--").partition("=")[0]
        if key is None:
            raise UserError(
                f"'{argument}': give settings as --NAME VALUE, after all other arguments"
            )
        options.setdefault(key, []).append(argument)
    return options


def _script_of(sweep: SweepConfig, path: Path, scripts: Iterable[Script]) -> Script:
    by_name = {script.program.name: script for script in scripts}
    if sweep.program is None:
        return next(iter(by_name.values()))
    if (script := by_name.get(sweep.program.name)) is None:
        raise UserError(
            f"{path}: program ({sweep.program}) must be the path of {' or '.join(by_name)}"
        )
    return script


def _checked_job(path: Path, label: str, script: Script, arguments: list[str]) -> Job:
    try:
        config = load_config(script.config, arguments, "")
    except UserError as error:
        raise UserError(f"{path}: {label}: {error}") from None
    return Job(label, script, arguments, config)


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:  # of any setting
    """Yield settings by dotted names."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", part) for inner, part in _flat(value))
        else:
            yield key, value


def _option(key: str, value: object) -> str:
    if value is None:
        return f"--{key}=null"
    return f"--{key}={json.dumps(value) if isinstance(value, list) else value}"
