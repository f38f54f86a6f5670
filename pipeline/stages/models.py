"""Which folders a model's name means."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.config_loading import load_config
from pipeline.errors import ModelError
from pipeline.model import DESCRIPTION
from pipeline.stages.workspace import Workspace
from pipeline.tracking.log import final_status, is_tracked, tracking_uri

log = logging.getLogger(__name__)

# Where a run keeps its models; the best is meant when the run itself is named.
BEST, LAST = Path("models/best"), Path("models/last")
# What was trained on what, in the run folder; of it, what the folds of an experiment share.
FACTS = "facts.json"
_ALIKE = ("configuration", "plan", "manifest")


def resolve_models(texts: Sequence[str], workspace: Path, uri: str | None = None) -> list[Path]:
    """Return the folders of the models that are named, an experiment's folds one by one, none of them twice.

    Args:
        texts: each a name that `resolve_model` takes, or an experiment: its folder or its YAML. The best models of its
            trained folds are meant.
        workspace: where fetched models are kept, and MLflow's database unless another is named.
        uri: tracking server or database; none: MLFLOW_TRACKING_URI, else the workspace's.

    Raises:
        ModelError: there is no such model.
        ConfigError: the YAML is none of an experiment.
    """
    found = (folder.resolve() for text in texts for folder in _resolve(text, workspace, uri))
    return list(dict.fromkeys(found))


def resolve_model(text: str, workspace: Path, uri: str | None = None) -> Path:
    """Return a model's folder.

    Args:
        text: a model's folder, a run's folder (its best model is meant), runs:/ID or models:/NAME@ALIAS.
        workspace: where fetched models are kept, and MLflow's database unless another is named.
        uri: tracking server or database; none: MLFLOW_TRACKING_URI, else the workspace's.

    Raises:
        ModelError: there is no such model.
    """
    if text.startswith(("runs:/", "models:/")):
        from pipeline.tracking.fetching import fetch_model

        return fetch_model(text, tracking_uri(uri, workspace), Workspace(workspace).fetched)
    folder = Path(text)
    for candidate in (folder, folder / BEST):
        if (candidate / DESCRIPTION).is_file():
            return candidate
    known = sorted(str(path.parents[2]) for path in Workspace(workspace).runs.glob(f"*/*/{BEST}/{DESCRIPTION}"))
    there = f"runs with a model: {', '.join(known)}" if known else f"no run in {workspace} has one yet: `medseg train`"
    raise ModelError(f"{text}: holds no model ({DESCRIPTION} or {BEST / DESCRIPTION}); {there}")


def has_ended(run: Path) -> bool:
    """Tell whether the training in a run's folder has come to its end: the last model is written, and the log, where
    there is one, says so after it.
    """
    return (run / LAST / DESCRIPTION).is_file() and (not is_tracked(run) or final_status(run) == "FINISHED")


def models_of_experiment(experiment: Path) -> list[Path]:
    """Return the best model of each fold that an experiment has trained, by the experiment's folder.

    Raises:
        ModelError: no fold is trained yet, or folds were not trained alike.
    """
    found = _models_of_folds(experiment)
    if not found:
        raise ModelError(f"{experiment}: no fold is trained yet; run `medseg train` first")
    return found


def _resolve(text: str, workspace: Path, uri: str | None) -> list[Path]:
    """Return the folders that one name means."""
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        config = load_config(path)
        return models_of_experiment(Workspace(config.workspace).experiment(config.name))
    return _models_of_folds(path) or [resolve_model(text, workspace, uri)]


def _models_of_folds(experiment: Path) -> list[Path]:
    """Return the best models that lie in the runs of a folder, and warn of those whose training has not ended.

    Raises:
        ModelError: they were not trained alike: by other settings, another plan, or on other data.
    """
    found = sorted(path.parent for path in experiment.glob(f"fold_*/{BEST}/{DESCRIPTION}"))
    runs = [model.parents[1] for model in found]
    _refuse_mixture(experiment, runs)
    if unended := [run.name for run in runs if not has_ended(run)]:
        log.warning("%s: %s: not trained to the end; the best model so far is taken", experiment, ", ".join(unended))
    return found


def _refuse_mixture(experiment: Path, runs: Sequence[Path]) -> None:
    """Raise where folds were not trained alike, as far as they say how."""
    ways: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        if (run / FACTS).is_file():
            facts = json.loads((run / FACTS).read_text(encoding="utf-8"))
            ways.setdefault(tuple(str(facts.get(name)) for name in _ALIKE), []).append(run.name)
    if len(ways) > 1:
        differing = [name for name, values in zip(_ALIKE, zip(*ways, strict=True), strict=True) if len({*values}) > 1]
        raise ModelError(
            f"{experiment}: its folds are not of one {' and '.join(differing)}: "
            f"{' | '.join(', '.join(names) for names in ways.values())}; train all folds as they are to be, and move "
            "away the folders of those that are not meant"
        )
