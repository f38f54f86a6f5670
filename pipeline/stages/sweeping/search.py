"""The trials of a sweep in Optuna: which comes next, which is pruned, and whose process has died."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import ConfigError, PipelineError
from pipeline.records import exclusively
from pipeline.stages.sweeping.study import Parameter, SweepStudy

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

# Steps of a training as a pruner counts them: thousandths, so that trials of different lengths can be compared.
_WHOLE = 1000
# A trial whose process died so often has killed it.
_MOST_ATTEMPTS = 3
# Trials before their importances say anything.
_ENOUGH_FOR_IMPORTANCE = 8
# What is noted of a trial: the number in its experiment's name, how often it was begun, which one it goes on with, and
# why it failed. One that failed for no reason was interrupted.
_RUN, _ATTEMPT, _GOES_ON, _ERROR = "run", "attempt", "goes on with", "error"


class Outcome(NamedTuple):
    """What has become of a trial."""

    run: int
    state: str
    value: float | None
    values: dict[str, Any]
    error: str | None


class Trial:
    """A trial that this process trains.

    Attributes:
        run: its number, in the name of its experiment.
        values: section.key -> value.
    """

    def __init__(self, study: optuna.Study, trial: optuna.Trial, values: dict[str, Any], lock: ExitStack) -> None:
        self.run = int(trial.user_attrs[_RUN])
        self.values = values
        self._study, self._trial, self._lock = study, trial, lock
        self._reported: set[int] = set()

    def is_hopeless(self, done: float, value: float) -> bool:
        """Report a value in training, and tell whether to go on is not worth it.

        Args:
            done: part of the training that is done, 0 to 1.
            value: of the metric.
        """
        self.repeat({round(_WHOLE * done): value})
        return bool(self._trial.should_prune())

    def repeat(self, values: Mapping[int, float]) -> None:
        """Report values by step, each once: a resumed training repeats some."""
        for step, value in values.items():
            if step not in self._reported:
                self._trial.report(value, step)
                self._reported.add(step)

    def completed(self, value: float) -> None:
        """End with a value."""
        self._tell("COMPLETE", value)

    def pruned(self) -> None:
        """End before the training's end, with the last value reported."""
        self._tell("PRUNED", None)

    def failed(self, reason: str) -> None:
        """End without a value."""
        self._trial.set_user_attr(_ERROR, reason)
        self._tell("FAIL", None)

    def _tell(self, state: str, value: float | None) -> None:
        """Write how it ended, and let go of it."""
        from optuna.trial import TrialState

        self._study.tell(self._trial, value, state=TrialState[state])
        self._lock.close()


class Search:
    """All trials of a sweep, of which several processes take one after another.

    Args:
        study: the sweep.
        folder: of the sweep; locks are kept here.

    Raises:
        PipelineError: Optuna is not installed.
    """

    def __init__(self, study: SweepStudy, folder: Path) -> None:
        self.sweep, self.folder = study, folder
        optuna = _optuna()
        folder.mkdir(parents=True, exist_ok=True)
        with exclusively(folder / ".trials.lock"):
            url = study.storage or f"sqlite:///{folder.resolve() / 'trials.db'}"
            # Processes wait for one another's writes.
            options = {"connect_args": {"timeout": 120}} if url.startswith("sqlite:") else {}
            storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
            self._study = optuna.create_study(
                storage=storage,
                study_name=study.name,
                direction=study.direction,
                load_if_exists=True,
                pruner=_pruner(study),
            )

    def begin(self, base: str) -> None:
        """Note what is searched, or see that it is what was searched before.

        Args:
            base: digest of what all trials share in their configuration, and of their data.

        Raises:
            ConfigError: the database holds trials of another sweep of this name.
        """
        wanted = {"search": self.sweep.search_digest(), "base": base}
        with exclusively(self.folder / ".trials.lock"):
            known = {name: self._study.user_attrs.get(name, digest) for name, digest in wanted.items()}
            for name, digest in known.items():
                self._study.set_user_attr(name, digest)
        if known != wanted:
            raise ConfigError(
                f"sweep {self.sweep.name}: its trials in {self.folder} are of other parameters, settings or data, of "
                f"the sweep or of {self.sweep.config}; put those back, or give this sweep another name"
            )

    def next_trial(self) -> Trial | None:
        """Return the next trial, first one that was interrupted; None where there are enough."""
        from optuna.trial import TrialState

        with exclusively(self.folder / ".trials.lock"):
            self._take_up_interrupted()
            trials = self._study.get_trials(deepcopy=False)
            waits = any(trial.state == TrialState.WAITING for trial in trials)
            if not waits and sum(not _was_interrupted(trial) for trial in trials) >= self.sweep.planned_trials:
                return None
            return self._ask(self.sweep.seed + len(trials))

    def outcomes(self) -> list[Outcome]:
        """Return what has become of each trial, in their order."""
        trials = self._study.get_trials(deepcopy=False)
        return [
            Outcome(
                int(trial.user_attrs.get(_RUN, trial.number)),
                trial.state.name.lower().replace("fail", "failed"),
                trial.value,
                {key: json.loads(value) if isinstance(value, str) else value for key, value in trial.params.items()},
                trial.user_attrs.get(_ERROR) or (_DIED if trial.state.name == "FAIL" else None),
            )
            for trial in trials
            if not _was_interrupted(trial)
        ]

    def importances(self) -> dict[str, float]:
        """Return each parameter's share in what decides whether a trial is good (PED-ANOVA, Watanabe et al. 2023).

        Nothing where there is but one parameter, or where too few trials have come to their end.
        """
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        complete = [outcome for outcome in self.outcomes() if outcome.state == "complete"]
        if len(complete) < _ENOUGH_FOR_IMPORTANCE or len(self.sweep.parameters) < 2:
            return {}
        return dict(get_param_importances(self._study, evaluator=PedAnovaImportanceEvaluator()))

    def _ask(self, seed: int) -> Trial:
        """Draw a trial's values, and hold it; for whoever holds the trials' lock."""
        optuna = _optuna()
        self._study.sampler = _sampler(self.sweep, seed)
        asked = self._study.ask()
        lock = ExitStack()
        lock.enter_context(exclusively(self._lock_of(asked.number), PipelineError("a new trial is held")))
        if _RUN not in asked.user_attrs:
            asked.set_user_attr(_RUN, asked.number)
        values = {key: _drawn(asked, key, parameter) for key, parameter in self.sweep.parameters.items()}
        # A grid's sampler would want to stop a loop of Optuna's own at its last point.
        self._study.sampler = optuna.samplers.RandomSampler()
        trial = Trial(self._study, asked, values, lock)
        if (before := asked.user_attrs.get(_GOES_ON)) is not None:
            trial.repeat(self._study.get_trials(deepcopy=False)[before].intermediate_values)
        return trial

    def _take_up_interrupted(self) -> None:
        """Put trials whose process has died in the queue, with the same values and the same experiment."""
        from optuna.trial import TrialState

        trials = self._study.get_trials(deepcopy=False)
        queued = {trial.user_attrs.get(_GOES_ON) for trial in trials}
        for trial in trials:
            if trial.state != TrialState.RUNNING or not self._is_free(trial.number):
                continue
            attempt = trial.user_attrs.get(_ATTEMPT, 1)
            if (
                trial.number not in queued
                and attempt < _MOST_ATTEMPTS
                and set(trial.params) == set(self.sweep.parameters)
            ):
                run = trial.user_attrs.get(_RUN, trial.number)
                notes = {_RUN: run, _ATTEMPT: attempt + 1, _GOES_ON: trial.number}
                self._study.enqueue_trial(trial.params, user_attrs=notes)
            self._study.tell(trial.number, state=TrialState.FAIL)

    def _is_free(self, number: int) -> bool:
        """Tell whether no process holds a trial: the kernel lets go of what dead ones held."""
        try:
            with exclusively(self._lock_of(number), PipelineError()):
                return True
        except PipelineError:
            return False

    def _lock_of(self, number: int) -> Path:
        return self.folder / "locks" / f"{number}.lock"


_DIED = f"its process died {_MOST_ATTEMPTS} times"


def _optuna() -> Any:
    """Import Optuna, which is an extra.

    Raises:
        PipelineError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise PipelineError(
            "medseg sweep needs Optuna: pip install '.[sweep]' in medseg's checkout, or pip install optuna"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _was_interrupted(trial: FrozenTrial) -> bool:
    """Tell whether a trial is gone on with under another number, or was not even drawn."""
    return trial.state.name == "FAIL" and _ERROR not in trial.user_attrs and not _is_given_up(trial)


def _is_given_up(trial: FrozenTrial) -> bool:
    """Tell whether a trial was begun often enough."""
    return bool(trial.user_attrs.get(_ATTEMPT, 1) >= _MOST_ATTEMPTS)


def _drawn(trial: optuna.Trial, key: str, parameter: Parameter) -> Any:
    """Draw a value; a choice is JSON in the database, which knows but a few types."""
    if parameter.choices is not None:
        return json.loads(trial.suggest_categorical(key, [json.dumps(choice) for choice in parameter.choices]))
    if parameter.is_whole:
        return trial.suggest_int(key, parameter.low, parameter.high, step=parameter.step or 1, log=parameter.log)
    return trial.suggest_float(key, parameter.low, parameter.high, step=parameter.step, log=parameter.log)


def _sampler(study: SweepStudy, seed: int) -> BaseSampler:
    """Return what draws the next trial's values: the same after the same trials."""
    samplers = _optuna().samplers
    if study.sampler == "grid":
        axes = {
            key: [json.dumps(value) for value in parameter.choices] if parameter.choices else parameter.grid
            for key, parameter in study.parameters.items()
        }
        return samplers.GridSampler(axes, seed=study.seed)
    return samplers.TPESampler(seed=seed) if study.sampler == "tpe" else samplers.RandomSampler(seed=seed)


def _pruner(study: SweepStudy) -> Any:
    """Return what decides that a trial is not worth going on."""
    pruners = _optuna().pruners
    if study.pruner == "median":
        from pipeline.stages.sweeping.pruning import MedianSoFar

        return MedianSoFar(study.startup_trials)
    if study.pruner == "hyperband":
        return pruners.HyperbandPruner(min_resource=_WHOLE // 9, max_resource=_WHOLE, reduction_factor=3)
    return pruners.NopPruner()
