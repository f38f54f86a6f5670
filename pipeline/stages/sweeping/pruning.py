"""The median rule for trials whose trainings are not measured at the same points; imports Optuna."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from optuna import Study
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState


class MedianSoFar(BasePruner):  # type: ignore[misc]  # Optuna is looked at without its types
    """Prunes a trial whose best value so far is worse than half of the completed ones' values at that point.

    Optuna's MedianPruner (the rule of Vizier, Golovin et al. 2017) asks for values at equal steps. A training by the
    clock is validated wherever its epochs end, so that of each other trial the last value up to that point counts.

    Args:
        startup_trials: as many trials are completed before any is pruned.
    """

    def __init__(self, startup_trials: int) -> None:
        self.startup_trials = startup_trials

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Tell whether to go on is not worth it."""
        completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        step = trial.last_step
        if step is None or len(completed) < self.startup_trials:
            return False
        reached = [_value_at(other.intermediate_values, step) for other in completed]
        others = [value for value in reached if value is not None]
        if not others:
            return False
        values: list[float] = list(trial.intermediate_values.values())
        if study.direction == StudyDirection.MAXIMIZE:
            return max(values) < median(others)
        return min(values) > median(others)


def _value_at(values: Mapping[int, float], step: int) -> float | None:
    """Return the last value up to a step; None where there is none yet."""
    reached = [at for at in values if at <= step]
    return values[max(reached)] if reached else None
