"""Workspace: the one folder in which medseg keeps what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config

# How the folder of a run begins that was set aside when its fold was trained anew.
EARLIER = "earlier_"


@dataclass(frozen=True)
class Workspace:
    """The layout of the workspace folder, `./work` by default.

    checks/                 what one read of each case taught
    stores/NAME-DIGEST/     plan.yaml, plans/ of other networks, fingerprint.json and cases/, shared by all
                            configurations of one data set and preprocessing
    runs/NAME/fold_K/       config, plan, events, checkpoint, models/best, models/last, evaluation
    runs/NAME/              evaluation of all folds, out_of_fold/ predictions, postprocessing.json chosen on them
    comparisons/NAME/       what `medseg compare` and `medseg find-best` found
    sweeps/NAME/            trials of `medseg sweep`; each is an experiment NAME-trial-N among the runs
    evaluations/NAME/       evaluations of models from elsewhere
    mlflow.db, mlartifacts/ MLflow's database and artifacts, unless a tracking server is named
    fetched/                models fetched from MLflow
    reproduced/ID/          a workspace of its own, in which `medseg reproduce` makes a run anew
    """

    root: Path

    @property
    def checks(self) -> Path:
        """Folder of case examinations."""
        return self.root / "checks"

    @property
    def stores(self) -> Path:
        """Folder of all stores."""
        return self.root / "stores"

    @property
    def runs(self) -> Path:
        """Folder of all runs."""
        return self.root / "runs"

    @property
    def comparisons(self) -> Path:
        """Folder of all comparisons."""
        return self.root / "comparisons"

    @property
    def evaluations(self) -> Path:
        """Folder of the evaluations of models that lie in no run folder."""
        return self.root / "evaluations"

    @property
    def sweeps(self) -> Path:
        """Folder of all sweeps."""
        return self.root / "sweeps"

    @property
    def reproduced(self) -> Path:
        """Folder of the workspaces in which runs are made anew."""
        return self.root / "reproduced"

    @property
    def fetched(self) -> Path:
        """Folder of models fetched from MLflow."""
        return self.root / "fetched"

    def store(self, config: Config, manifest_name: str) -> Path:
        """Return the store of a data set under a configuration's preprocessing.

        The memory that is planned for has no part in it: images are treated alike whatever it is.
        """
        treatment = config.preprocessing.changed(memory_gb="auto")
        return self.stores / f"{manifest_name}-{treatment.digest()[:8]}"

    def experiment(self, name: str) -> Path:
        """Return the folder of an experiment: one run folder a fold."""
        return self.runs / name

    def run(self, name: str, fold: int) -> Path:
        """Return the run folder of one fold."""
        return self.experiment(name) / f"fold_{fold}"
