"""Minutes of training to a Dice, on a fold of the hippocampus: medseg, nnU-Net and MONAI's DynUNet, each by its own
recipe, its schedule ending with each of several budgets.

    python benchmarks/time_to_dice.py --peer-python .peers/nnunet/bin/python --out OUT [--fold 0] [--minutes 10 25 60]

Same cases, same machine, one party after another. Minutes are those of training steps, batches and augmentation
included; start-up, preprocessing and validation are not in them (medseg's budget holds them, which costs it steps).
Dice is the mean over both structures and the fold's cases, on their native grids, by medseg's scoring of each party's
own predictions; a structure that is missed counts as 0. The peers have the allocator's settings that medseg gives
itself. OUT/fold_K/points.json holds what is measured, a run as it lands; what is there is not measured again.
OUT/fold_K/time_to_dice.svg draws it.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from peer_training import SCRIPTS, case_dice, mean_dice, train_peer, write_cases
from side_by_side import medseg

from pipeline.config_loading import load_config
from pipeline.data.manifest import Manifest, load_manifest

OURS = "medseg"
WANTED = (0.85, 0.88, 0.89)
TICKS = (1, 2, 5, 10, 25, 60)  # minutes

# Of medseg on two cores, to validate about as often as the peers keep weights.
EPOCH_MINUTES = 0.5


@dataclass(frozen=True)
class Point:
    """A party's Dice of each structure after so many minutes and steps of a budget."""

    party: str
    budget: float
    minutes: float
    steps: int
    dice: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean over the structures."""
        return float(np.mean(list(self.dice.values())))


def run_medseg(config: Path, fold: int, budget: float, folder: Path, count: int) -> list[Point]:
    """Train by the command line, and read from the run's events when which Dice was reached."""
    name = f"time_to_dice_{budget:g}"
    often = max(1, round(budget / EPOCH_MINUTES / count))
    changes = [f"name={name}", f"training.budget={{minutes: {budget}}}", f"training.validation_every_epochs={often}"]
    common = [config, "--workspace", folder / OURS, *(part for change in changes for part in ("--set", change))]
    medseg("preprocess", *common)
    medseg("train", *common, "--fold", fold)
    return points_of_events(folder / OURS / "runs" / name / f"fold_{fold}" / "events.jsonl", budget)


def points_of_events(path: Path, budget: float) -> list[Point]:
    """Return a point for each validation; minutes are the steps' own, whatever lay between them."""
    points, seconds, last = [], 0.0, 0
    for line in path.read_text().splitlines():
        event = json.loads(line)
        values = event.get("values", {})
        if event["kind"] != "metrics" or "train/steps_per_s" not in values:
            continue
        seconds += (event["step"] - last) / values["train/steps_per_s"]
        last = event["step"]
        dice = {name.removeprefix("val/dice/"): v for name, v in values.items() if name.startswith("val/dice/")}
        if dice:
            points.append(Point(OURS, budget, seconds / 60, last, dice))
    return points


def run_peer(
    party: str, python: Path, manifest: Manifest, fold: int, budget: float, folder: Path, count: int
) -> list[Point]:
    """Train and predict in the peers' environment, and score what was predicted."""
    cases = manifest.validation_cases(fold)
    return [
        Point(party, budget, kept.minutes, kept.steps, mean_dice(case_dice(manifest, cases, Path(kept.folder))))
        for kept in train_peer(party, python, folder, budget, count)
    ]


def minutes_to(points: list[Point], wanted: float) -> float | None:
    """Return the fewest minutes in which any of a party's runs had the Dice; between two points, by a straight line."""
    found = []
    for budget in {point.budget for point in points}:
        run = sorted((point for point in points if point.budget == budget), key=lambda point: point.minutes)
        reached = next((n for n, point in enumerate(run) if point.mean >= wanted), None)
        if reached is None:
            continue
        before, after = run[reached - 1] if reached else None, run[reached]
        share = (wanted - before.mean) / (after.mean - before.mean) if before else 1.0
        found.append(before.minutes + share * (after.minutes - before.minutes) if before else after.minutes)
    return min(found, default=None)


def report(points: list[Point], folder: Path) -> None:
    """Print the table, and draw the curves."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    whole, top = figure.subplots(1, 2, subplot_kw={"xlabel": "minutes of training", "xscale": "log"})
    whole.set(ylabel="mean Dice", ylim=(-0.02, 1))
    top.set(ylim=(0.84, 0.9))
    print(f"{'':10}" + "".join(f"{f'min to {wanted}':>12}" for wanted in WANTED) + f"{'best':>9}")
    for color, party in zip(("tab:blue", "tab:orange", "tab:green"), (OURS, *SCRIPTS), strict=True):
        own = [point for point in points if point.party == party]
        if not own:
            continue
        cells = [minutes_to(own, wanted) for wanted in WANTED]
        shown = "".join(f"{'-' if cell is None else f'{cell:.1f}':>12}" for cell in cells)
        print(f"{party:10}{shown}{max(point.mean for point in own):9.4f}")
        for axes, budget in product((whole, top), sorted({point.budget for point in own})):
            run = sorted((p for p in own if p.budget == budget), key=lambda point: point.minutes)
            axes.plot([p.minutes for p in run], [p.mean for p in run], "o-", color=color, ms=3)
        whole.plot([], [], "o-", color=color, label=party)
    for axes in (whole, top):
        axes.set_xticks(TICKS, [str(minutes) for minutes in TICKS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    whole.legend(loc="center left")
    figure.savefig(folder / "time_to_dice.svg")


def read_points(path: Path) -> list[Point]:
    """Return what is measured already."""
    return [Point(**point) for point in json.loads(path.read_text())] if path.exists() else []


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=root / "configs" / "hippocampus_unet.yaml")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 25, 60])
    parser.add_argument("--snapshots", type=int, default=8, help="points of each curve, each a prediction of the fold")
    parser.add_argument("--only", choices=[OURS, *SCRIPTS], nargs="+", default=[OURS, *SCRIPTS])
    chosen = parser.parse_args()
    if {*chosen.only} & {*SCRIPTS} and not chosen.peer_python:
        parser.error("the peers need --peer-python; --only medseg does without")
    manifest = load_manifest(load_config(chosen.config).data.manifest)
    folder = chosen.out.resolve() / f"fold_{chosen.fold}"
    write_cases(manifest, chosen.fold, folder)
    points = read_points(folder / "points.json")
    for budget, party in product(chosen.minutes, chosen.only):
        if any((point.party, point.budget) == (party, budget) for point in points):
            continue
        if party == OURS:
            points += run_medseg(chosen.config.resolve(), chosen.fold, budget, folder, chosen.snapshots)
        else:
            python = chosen.peer_python.absolute()
            points += run_peer(party, python, manifest, chosen.fold, budget, folder, chosen.snapshots)
        (folder / "points.json").write_text(json.dumps([asdict(point) for point in points], indent=1))
        report(points, folder)
    report(points, folder)


if __name__ == "__main__":
    main()
