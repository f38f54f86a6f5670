"""Accuracy on the Decathlon's hippocampus: native-grid Dice after a configuration's own budget, fold by fold.

    python benchmarks/hippocampus.py [--config configs/hippocampus_unet.yaml] [--minutes 15] [--workspace W]
    python benchmarks/hippocampus.py --workspace W --fold all [--kept-aside OTHER_CASES.json]
    python benchmarks/hippocampus.py --workspace W --seeds 0 1 2

Each fold's Dice is said as it lands, by the best of its validations on the fold held out; minutes are a fold's by the
clock, from its first probe to its last model. The same command goes on after a kill, and trains no finished fold again.
The spread of folds holds what differs between trainings and between cases, that of seeds on one fold trainings alone.
With --kept-aside, a manifest of cases that are in no fold, the ensemble of the folds labels those. Beside it all stand
the five-fold means published for nnU-Net 3d_fullres and MONAI's DynUNet, after some 9 GPU hours a fold.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from side_by_side import medseg, train_or_go_on

from pipeline.config_loading import load_config
from pipeline.data.manifest import load_manifest
from pipeline.tracking import training_seconds

PUBLISHED = {
    "nnU-Net, five folds": {"anterior": 0.8975, "posterior": 0.8807},
    "MONAI DynUNet, five folds": {"anterior": 0.8983, "posterior": 0.8816},
}

Dice = dict[str, float]


def trained_fold(options: list[object], device: str, experiment: Path, fold: int) -> Dice:
    """Train a fold unless it is finished, and return its Dice of each structure."""
    run = experiment / f"fold_{fold}"
    train_or_go_on([*options, "--device", device], run, fold)
    summary = evaluated(options, device, experiment / "evaluation" / "fold")
    classes = summary["cross_validation"]["classes"]
    dice = {name: classes[name]["dice"]["by_fold"][str(fold)] for name in summary["classes"] if name != "mean"}
    say(f"{experiment.name}, fold {fold}", dice, f"{(training_seconds(run) or 0) / 60:5.1f} min")
    return dice


def evaluated(options: list[object], device: str, out: Path, *more: object) -> dict:
    """Evaluate the folds that are trained so far, and return the summary."""
    medseg("evaluate", *options, "--device", device, "--out", out, *more)
    return json.loads((out / "summary.json").read_text())


def spread(what: str, found: list[Dice]) -> Dice:
    """Say and return the mean of several trainings; and how far they lie apart."""
    table = {name: [dice[name] for dice in found] for name in found[0]}
    mean = {name: float(np.mean(values)) for name, values in table.items()}
    if len(found) > 1:
        say(f"{what}, mean", mean)
        say(f"{what}, SD", {name: float(np.std(values, ddof=1)) for name, values in table.items()})
    return mean


def say(what: str, dice: Dice, more: str = "") -> None:
    """Print a line."""
    print(f"{what:44}", *(f"{name} {value:.4f} " for name, value in dice.items()), more, flush=True)


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
    parser.add_argument("--kept-aside", type=Path)
    chosen = parser.parse_args()
    workspace = chosen.workspace or Path(tempfile.mkdtemp(prefix="medseg-hippocampus-"))
    config = load_config(chosen.config, chosen.set)
    settings = [f"training.budget={{minutes: {chosen.minutes}}}"] if chosen.minutes else []
    folds = load_manifest(config.data.manifest).folds if chosen.fold == "all" else [int(chosen.fold)]
    of_seeds = []
    for seed in chosen.seeds or [config.seed]:
        name = f"{config.name}_seed_{seed}" if chosen.seeds else config.name
        changes = [*settings, *chosen.set, f"name={name}", f"seed={seed}"]
        options = [chosen.config, "--workspace", workspace, *(part for one in changes for part in ("--set", one))]
        medseg("preprocess", *options)
        experiment = workspace / "runs" / name
        of_seeds.append(
            spread(f"{name}, folds", [trained_fold(options, chosen.device, experiment, fold) for fold in folds])
        )
        if chosen.kept_aside:
            out = experiment / "evaluation" / "kept_aside"
            classes = evaluated(options, chosen.device, out, "--manifest", chosen.kept_aside)["classes"]
            dice = {name: found["metrics"]["dice"]["mean"] for name, found in classes.items() if name != "mean"}
            say(f"{name}, kept aside", dice)
    spread("seeds", of_seeds)
    for name, dice in PUBLISHED.items():
        say(name, dice)


if __name__ == "__main__":
    main()
