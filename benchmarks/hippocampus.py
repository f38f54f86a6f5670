"""Accuracy on the Decathlon's hippocampus: native-grid Dice after a configuration's own budget, fold by fold.

    python benchmarks/hippocampus.py [--config configs/hippocampus_unet.yaml] [--minutes 15] [--workspace W]
    python benchmarks/hippocampus.py --workspace W --fold all [--kept-aside OTHER_CASES.json]
    python benchmarks/hippocampus.py --workspace W --seeds 0 1 2

Each fold's Dice is said as it lands, by the best of its validations on the fold held out; minutes are a fold's by the
clock, from its first probe to its last model. On a GPU its utilisation over all of it is stated (nvidia-ml-py), label
maps included; wanted there: a fold in at most 10 minutes, the five in an hour. The same command goes on after a kill,
and trains no finished fold again.
The spread of folds holds what differs between trainings and between cases, that of seeds on one fold trainings alone.
With --kept-aside, a manifest of cases that are in no fold, the ensemble of the folds labels those. Beside it all stand
the five-fold means published for nnU-Net 3d_fullres and MONAI's DynUNet, after some 9 GPU hours a fold.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gpu import utilisation
from peer_training import case_dice, mean_dice
from side_by_side import medseg, train_or_go_on

from pipeline.config_loading import load_config
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.hardware import pick_device
from pipeline.tracking import training_seconds

PUBLISHED = {
    "nnU-Net, five folds": {"anterior": 0.8975, "posterior": 0.8807},
    "MONAI DynUNet, five folds": {"anterior": 0.8983, "posterior": 0.8816},
}

Dice = dict[str, float]


@dataclass(frozen=True)
class Experiment:
    """A configuration with one seed: the command line's options, and the folder of its folds."""

    config: Path
    settings: tuple[str, ...]
    device: str
    workspace: Path
    name: str

    @property
    def folder(self) -> Path:
        """Folder of the folds' runs."""
        return self.workspace / "runs" / self.name

    @property
    def options(self) -> list[object]:
        """What each command is told."""
        changes = (part for setting in (*self.settings, f"name={self.name}") for part in ("--set", setting))
        return [self.config, "--workspace", self.workspace, *changes]

    def fold(self, manifest: Manifest, fold: int) -> Dice:
        """Train a fold unless it is finished, and return its Dice of each structure."""
        run = self.folder / f"fold_{fold}"
        train_or_go_on([*self.options, "--device", self.device], run, fold)
        predicted = self.evaluated(self.folder / "evaluation" / "fold")
        dice = mean_dice(case_dice(manifest, manifest.validation_cases(fold), predicted))
        say(f"{self.name}, fold {fold}", dice, f"{(training_seconds(run) or 0) / 60:5.1f} min")
        return dice

    def kept_aside(self, path: Path) -> None:
        """Have the folds label other cases together, and say their Dice."""
        manifest = load_manifest(path)
        predicted = self.evaluated(self.folder / "evaluation" / "kept_aside", "--manifest", path)
        dice = mean_dice(case_dice(manifest, [case for case in manifest.cases if case.label], predicted))
        say(f"{self.name}, ensemble, {len(manifest.cases)} cases kept aside", dice)

    def evaluated(self, out: Path, *more: object) -> Path:
        """Evaluate the folds that are trained so far, and return the folder of the label maps."""
        medseg("evaluate", *self.options, "--device", self.device, "--out", out, *more)
        return out / "predictions"


def spread(what: str, found: list[Dice]) -> Dice:
    """Return the mean of several trainings; say it, and how far they lie apart."""
    table = {name: [dice[name] for dice in found] for name in found[0]}
    mean = {name: float(np.mean(values)) for name, values in table.items()}
    if len(found) > 1:
        say(f"{what}, mean", mean)
        say(f"{what}, SD", {name: float(np.std(values, ddof=1)) for name, values in table.items()})
    return mean


def say(what: str, dice: Dice, more: str = "") -> None:
    """Print a line."""
    print(f"{what:48}", *(f"{name} {value:.4f} " for name, value in dice.items()), more, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--config", type=Path, default=root / "configs" / "hippocampus_unet.yaml")
    parser.add_argument("--fold", default="0", help="a number, or all")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the configuration's own")
    parser.add_argument("--minutes", type=float, help="of each fold; default: the configuration's budget")
    parser.add_argument("--set", action="append", default=[], help="SECTION.KEY=VALUE, as medseg has it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("--kept-aside", type=Path, help="manifest of cases that no fold has, for the ensemble")
    chosen = parser.parse_args()
    workspace = chosen.workspace or Path(tempfile.mkdtemp(prefix="medseg-hippocampus-"))
    settings = [f"training.budget={{minutes: {chosen.minutes}}}"] if chosen.minutes else []
    settings += chosen.set
    config = load_config(chosen.config, settings)
    manifest = load_manifest(config.data.manifest)
    folds = manifest.folds if chosen.fold == "all" else [int(chosen.fold)]
    names = {f"{config.name}_seed_{seed}": [f"seed={seed}"] for seed in chosen.seeds or ()} or {config.name: []}
    of_seeds = []
    for name, seed in names.items():
        experiment = Experiment(chosen.config, (*settings, *seed), chosen.device, workspace, name)
        medseg("preprocess", *experiment.options)
        start = time.perf_counter()
        with utilisation(pick_device(chosen.device)) as used:
            of_seeds.append(spread(f"{name}, folds", [experiment.fold(manifest, fold) for fold in folds]))
        minutes = (time.perf_counter() - start) / 60
        busy = f"; GPU utilisation {np.mean(used):.0f} %" if used else ""
        print(f"{name}, this command: {minutes:.1f} min, label maps and scores included{busy}", flush=True)
        if chosen.kept_aside:
            experiment.kept_aside(chosen.kept_aside)
    spread("seeds", of_seeds)
    for name, dice in PUBLISHED.items():
        say(name, dice)


if __name__ == "__main__":
    main()
