"""Experiments on phantoms, as several stages' tests begin them."""

from pathlib import Path

from tracking_databases import lay_database

from pipeline.config import Config
from pipeline.config_loading import load_config, packaged
from pipeline.data.phantoms import write_phantom_dataset
from pipeline.stages import manifest, preprocess, train
from pipeline.stages.fold.task import FoldTask


def preprocessed(folder: Path, settings: tuple[str, ...], *, cases: int, folds: int) -> Config:
    """Return the demo's configuration with other settings, on phantoms that are preprocessed."""
    manifest.run(write_phantom_dataset(folder / "set", cases=cases), folder / "mine.json", folds=folds)
    return preprocessed_demo(folder / "mine.json", settings)


def preprocessed_demo(path: Path, settings: tuple[str, ...]) -> Config:
    """Return the demo's configuration with other settings, on a manifest whose cases are preprocessed beside it, in a
    workspace that has a database.
    """
    config = load_config(packaged("demo.yaml"), [f"data.manifest={path}", *settings])
    config = config.changed(workspace=path.parent / "work")
    lay_database(config.workspace)
    preprocess.run(config)
    return config


def task_of(config: Config) -> FoldTask:
    """Return the task of an experiment's first fold, on the CPU."""
    (task,) = train.fold_tasks(config, "0", "cpu")
    return task


def changed(config: Config, section: str, **values: object) -> Config:
    """Return a configuration with other values in one section."""
    return config.changed(**{section: getattr(config, section).changed(**values)})
