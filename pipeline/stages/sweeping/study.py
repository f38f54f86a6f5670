"""A sweep's YAML: which settings of a configuration are searched, how, and how long."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.config import Config
from pipeline.config_loading import (
    OptionChecks,
    are_options_of,
    as_override,
    as_sections,
    load_config,
    record_problem,
    with_absolute_paths,
)
from pipeline.config_yaml import Entry, Problem, read_file
from pipeline.errors import ConfigError
from pipeline.records import Record, digest_of

Checks = Callable[[], OptionChecks]

# Sections that say where a run is kept, and not what is trained.
_NOT_SEARCHED = ("name", "workspace", "tracking", "evaluation", "data", "extends")


class Parameter(Record):
    """What a setting may be: one of a list of choices, or a number of a range.

    Attributes:
        choices: any values that YAML knows.
        low: smallest number; a range from integer to integer holds integers alone.
        high: largest number.
        log: draw evenly in the logarithm.
        step: between two numbers of the range.
    """

    choices: tuple[Any, ...] | None = None
    low: Any = None
    high: Any = None
    log: bool = False
    step: Any = None

    @model_validator(mode="after")
    def _one_form(self) -> Parameter:
        if self.choices is not None:
            if len(self.choices) == 0 or self.is_range or self.log or self.step is not None:
                raise ValueError("expected a list of choices, or a range from low to high; not both, and not empty")
            return self
        if not all(_is_number(value) for value in (self.low, self.high)) or self.low >= self.high:
            raise ValueError("expected choices, or numbers low and high, the smaller one first")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("expected a range above 0 and without a step, for it is drawn in its logarithm")
        if self.step is not None and not (_is_number(self.step) and self.step > 0):
            raise ValueError(f"expected a step above 0, got {self.step!r}")
        return self

    @property
    def is_range(self) -> bool:
        """Whether any of the range's ends is said."""
        return self.low is not None or self.high is not None

    @property
    def is_whole(self) -> bool:
        """Whether the range holds integers alone."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that must all be legal: the choices, or the range's ends."""
        return (self.low, self.high) if self.choices is None else self.choices

    @property
    def grid(self) -> list[Any] | None:
        """All values there are; None where they cannot be counted."""
        if self.choices is not None:
            return list(self.choices)
        if self.log or (self.step is None and not self.is_whole):
            return None
        step = self.step or 1
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [self.low + index * step for index in range(count)]


class SweepStudy(Record):
    """A sweep's YAML.

    Attributes:
        name: of the sweep and its folder; its trials are experiments NAME-trial-N.
        config: the configuration that is varied; in the YAML relative to it.
        folds: each trial is trained for each; its value is the mean. The first alone decides whether it is pruned.
        trials: how many, those that failed or were pruned included.
        timeout_minutes: no trial begins later than this after the command; None: no limit.
        metric: score of the validation, by whose best value in training a trial is judged: score, or dice/LABEL.
        direction: maximize or minimize it.
        sampler: tpe (Bergstra et al. 2011), random, or grid.
        pruner: median: ends a trial that is worse than half of the earlier ones were at that part of their training;
            hyperband (Li et al. 2018); or none.
        startup_trials: as many trials end before the median pruner ends any.
        seed: of the sampler.
        overrides: `set` in the YAML: section.key -> value, the same for all trials; paths in the YAML relative to it.
        parameters: section.key -> what it may be; paths likewise.
        storage: database of the trials, as SQLAlchemy names it; None: an SQLite file in the sweep's folder.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    config: Path
    folds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    trials: Annotated[int, Field(ge=1)] = 20
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None
    metric: str = "score"
    direction: Literal["maximize", "minimize"] = "maximize"
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    pruner: Literal["median", "hyperband", "none"] = "median"
    startup_trials: Annotated[int, Field(ge=1)] = 5
    seed: Annotated[int, Field(ge=0)] = 0
    overrides: dict[str, Any] = Field(default={}, alias="set")
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    storage: str | None = None

    @property
    def grid(self) -> list[dict[str, Any]]:
        """All combinations of values; none where one cannot be counted."""
        axes = [parameter.grid for parameter in self.parameters.values()]
        if any(axis is None for axis in axes):
            return []
        return [dict(zip(self.parameters, values, strict=True)) for values in itertools.product(*filter(None, axes))]

    @property
    def planned_trials(self) -> int:
        """How many trials there will be: no more than a grid has points."""
        return min(self.trials, len(self.grid)) if self.sampler == "grid" else self.trials

    def search_digest(self) -> str:
        """Return a digest of what earlier trials must share with later ones, not of how many there shall be."""
        return digest_of(self.model_dump(mode="json", exclude={"trials", "timeout_minutes", "storage", "config"}))

    def base(self) -> Config:
        """Return the configuration that is varied: what all trials share stands in it, and of what differs anything."""
        return self.config_of({key: parameter.extremes[0] for key, parameter in self.parameters.items()}, self.name)

    def said_of(self, values: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return what a YAML that extends the configuration says to be that of a trial."""
        return as_sections({**self.overrides, **values, "name": name})

    def config_of(self, values: Mapping[str, Any], name: str) -> Config:
        """Return the configuration of a trial.

        Raises:
            ConfigError: these values do not go together.
        """
        said = self.said_of(values, name)
        return load_config(self.config, [as_override(section, value) for section, value in said.items()])


def load_sweep(path: Path, checks: Checks | None = None) -> SweepStudy:
    """Read a sweep's YAML; the ends of each range and all choices must be legal in its configuration.

    Args:
        path: the YAML.
        checks: who knows the options of networks, losses, optimisers and schedules.

    Raises:
        ConfigError: it is no sweep, or its configuration is wrong; every error a line, each with its place.
    """
    problems: list[Problem] = []
    tree = read_file(path, problems)
    study = None
    try:
        study = SweepStudy.model_validate_json(json.dumps(tree.plain), strict=True)
    except ValidationError as error:
        for found in error.errors():
            record = Parameter if found["loc"][:1] == ("parameters",) else SweepStudy
            problems.append(record_problem(tree, found, record))
    if study is not None and not problems:
        study = _settled(study, path.parent.resolve())
        problems += _parameter_problems(study, tree, checks)
    if study is None or problems:
        raise ConfigError("\n".join(map(str, sorted(set(problems)))))
    return study


def _settled(study: SweepStudy, folder: Path) -> SweepStudy:
    """Return a sweep whose paths, relative to the folder of its YAML, are absolute."""
    parameters = {}
    for key, parameter in study.parameters.items():
        choices = parameter.choices and tuple(
            with_absolute_paths({key: choice}, folder)[key] for choice in parameter.choices
        )
        parameters[key] = parameter.model_copy(update={"choices": choices})
    overrides = with_absolute_paths(study.overrides, folder)
    config = (folder / study.config).resolve()
    return study.model_copy(update={"config": config, "overrides": overrides, "parameters": parameters})


def _parameter_problems(study: SweepStudy, tree: Entry, checks: Checks | None) -> list[Problem]:
    """Return which settings the configuration has not, and which values it does not take."""
    load_config(study.config, [as_override(*setting) for setting in study.overrides.items()], checks)
    problems = []
    for key, parameter in study.parameters.items():
        keys = ("parameters", key)
        place, full = tree.place_of(keys), ".".join(keys)
        if key.split(".")[0] in _NOT_SEARCHED:
            problems.append(Problem(place, full, "says where or on what is trained, and cannot be searched"))
            continue
        if study.sampler == "grid" and parameter.grid is None:
            problems.append(Problem(place, full, "a grid needs choices, integers, or a step"))
        for other in (other for other, value in study.overrides.items() if value is None):
            if key.startswith(f"{other}."):
                todo = f"leave that out of set, and mend {study.config}"
                problems.append(Problem(place, full, f"lies in {other}, which set empties: no YAML says both; {todo}"))
        names = {other: named for other, named in study.parameters.items() if are_options_of(key, other)}
        beside = [{other: value} for other, named in names.items() for value in named.extremes]
        for value, others in itertools.product(parameter.extremes, beside or [{}]):
            problems += [Problem(place, full, line) for line in _refusals(study, key, value, others, checks)]
    return problems


def _refusals(study: SweepStudy, key: str, value: Any, others: Mapping[str, Any], checks: Checks | None) -> list[str]:
    """Say why the configuration does not take a value beside those of other parameters, but not what is wrong there."""
    beside = [as_override(*setting) for setting in {**study.overrides, **others}.items()]
    override = as_override(key, value)
    try:
        load_config(study.config, [*beside, override], checks)
    except ConfigError as error:
        named = "".join(f" and {other} {said!r}" for other, said in others.items())
        todo = f"; vary both together, as choices of {key.split('.')[0]}" if others else ""
        theirs = tuple(f"--set {as_override(*setting)}: " for setting in others.items())
        lines = [line for line in str(error).splitlines() if not line.startswith(theirs)]
        return [f"with {value!r}{named}: {line.removeprefix(f'--set {override}: ')}{todo}" for line in lines]
    return []


def _is_number(value: Any) -> bool:
    """Tell whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
