"""Dice on the soft-tissue sarcomas, fold by fold: medseg's configurations beside nnU-Net, each for the same minutes.

    python benchmarks/sts.py --out OUT
        --peer-python .peers/nnunet/bin/python [--minutes 30] [--folds 0] [--channels MR_T1 all]

Same cases, folds and machine, one party after another; the learning-rate schedule of each ends with the minutes. For
medseg they hold start-up, probe and validation, for nnU-Net training steps alone, with the allocator's settings that
medseg gives itself. Scored are the last weights of each, which no validation on the fold has chosen, by medseg's
scoring on the label's own grid; a tumour that is missed counts as 0.

`--channels` are sets of the manifest's channels, commas between them, or all. Of a set only patients take part who have
a channel of it. nnU-Net wants the channels of a patient on one grid and has no rule for one that is missing: they are
resampled onto the label's grid, and a missing one is zeros, as medseg's configuration has it (there after
normalisation). nnU-Net's minutes do not hold its planning, preprocessing and the minute that measures its speed.

OUT/results holds a file for each training that is measured, as it lands; the same command goes on with what is missing.
Two commands may share an OUT, each with a configuration of its own on a core of its own.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
from peer_training import case_dice, train_peer, write_cases
from side_by_side import medseg, train_or_go_on

from pipeline.config_loading import load_config
from pipeline.data.manifest import Manifest, load_manifest, save_manifest
from pipeline.evaluation.comparison.statistics import signed_rank_p, wins
from pipeline.evaluation.statistics import estimate
from pipeline.model import DESCRIPTION, read_description
from pipeline.records import write_json
from pipeline.stages.models import LAST

PEER = "nnunet"
ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [ROOT / "configs" / f"{name}.yaml" for name in ("sts_unet", "sts_multiscale_pathways")]


@dataclass(frozen=True)
class Key:
    """A training to be done."""

    channels: str
    fold: int
    party: str
    minutes: float


@dataclass(frozen=True)
class Result:
    """What came of it: the steps, and the Dice of each patient of the fold, the mean over the structures."""

    key: Key
    steps: int
    dice: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean over the patients."""
        return float(np.mean(list(self.dice.values())))


def with_channels(manifest: Manifest, chosen: str) -> Manifest:
    """Return a manifest of some of the channels, less the patients who have none of them."""
    if chosen == "all":
        return manifest
    names = chosen.split(",")
    cases = (case.changed(images={n: f for n, f in case.images.items() if n in names}) for case in manifest.cases)
    return manifest.changed(
        name="_".join([manifest.name, *names]),
        channels={name: manifest.channels[name] for name in names},
        cases=tuple(case for case in cases if case.images),
    )


def run_medseg(config: Path, manifest: Path, key: Key, workspace: Path) -> tuple[Path, int]:
    """Train by the command line, and return the folder of the last model's label maps of the fold held out, and the
    steps.
    """
    name = f"{key.party}_{key.channels.replace(',', '_')}_{key.minutes:g}_minutes"
    changes = [f"name={name}", f"data.manifest={manifest}", f"training.budget={{minutes: {key.minutes}}}"]
    options = [config, "--workspace", workspace, *(part for change in changes for part in ("--set", change))]
    medseg("preprocess", *options)
    run = workspace / "runs" / name / f"fold_{key.fold}"
    train_or_go_on(options, run, key.fold)
    medseg("evaluate", run / LAST, "--workspace", workspace)
    return run / "evaluation" / "fold_last" / "predictions", read_description(run / LAST / DESCRIPTION).step


def run_peer(python: Path, manifest: Manifest, key: Key, folder: Path) -> tuple[Path, int]:
    """Train in the peer's environment, and return the folder of its label maps, and the steps."""
    write_cases(manifest, key.fold, folder)
    (kept,) = train_peer(PEER, python, folder, key.minutes, count=1)
    return Path(kept.folder), kept.steps


def report(results: list[Result]) -> None:
    """Print a line for each party and set of channels, and how two differ in one of them."""
    lines = by_line(results)
    folds = sorted({result.key.fold for result in results})
    print(f"{'':48}" + "".join(f"  fold {fold}" for fold in folds) + "  SD of folds, mean of the patients, steps")
    for (channels, minutes, party), of_folds in lines.items():
        cells = "".join(f"{of_folds[fold].mean:8.4f}" if fold in of_folds else f"{'-':>8}" for fold in folds)
        means, steps = zip(*((result.mean, result.steps) for result in of_folds.values()), strict=True)
        sd = f"{np.std(means, ddof=1):8.4f}" if len(means) > 1 else f"{'-':>8}"
        title, mean = f"{channels}, {minutes:g} min: {party}", with_interval(list(patients(of_folds).values()))
        print(f"{title:48}{cells}{sd}  {mean} of {len(patients(of_folds))}, {min(steps)} to {max(steps)}", flush=True)
    for one, other in combinations(lines, 2):
        (channels, minutes, party), (other_channels, other_minutes, other_party) = one, other
        if minutes == other_minutes and (channels == other_channels or party == other_party):
            title = f"{minutes:g} min: {party} on {channels} less {other_party} on {other_channels}"
            compare(title, patients(lines[one]), patients(lines[other]))


def compare(title: str, dice: dict[str, float], others: dict[str, float]) -> None:
    """Print how two parties differ over the patients that both have."""
    differences = np.array([dice[patient] - others[patient] for patient in dice if patient in others])
    if len(differences):
        better = f"better in {wins(differences)} of {len(differences)}, p {signed_rank_p(differences):.2g}"
        print(f"{title}: {with_interval(differences)}, {better} (Wilcoxon)", flush=True)


def patients(of_folds: dict[int, Result]) -> dict[str, float]:
    """Return the Dice of all patients of some folds."""
    return {patient: value for result in of_folds.values() for patient, value in result.dice.items()}


def with_interval(values: Sequence[float] | np.ndarray) -> str:
    """Return a mean over patients with its 95 % interval, by bootstrap."""
    found = estimate(np.asarray(values, np.float64), samples=10_000, seed=0)
    return f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]"


def by_line(results: list[Result]) -> dict[tuple[str, float, str], dict[int, Result]]:
    """Return what belongs into one line of the table: channels, minutes and party -> the result of each fold."""
    lines: dict[tuple[str, float, str], dict[int, Result]] = {}
    for result in sorted(results, key=lambda result: astuple(result.key)):
        key = result.key
        lines.setdefault((key.channels, key.minutes, key.party), {})[key.fold] = result
    return lines


def read_results(folder: Path) -> list[Result]:
    """Return what is measured already, by whichever command."""
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return [Result(Key(**one["key"]), one["steps"], one["dice"]) for one in found]


def file_of(key: Key) -> str:
    """Return the name of a result's file."""
    return f"{key.party}_{key.channels.replace(',', '_')}_{key.minutes:g}_minutes_fold_{key.fold}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path, help="without it, medseg alone")
    parser.add_argument("--configs", type=Path, nargs="+", default=CONFIGS, help="of one manifest")
    parser.add_argument("--channels", nargs="+", default=["MR_T1", "all"])
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=30)
    chosen = parser.parse_args()
    configs = {load_config(path).name: path for path in chosen.configs}
    whole = load_manifest(load_config(chosen.configs[0]).data.manifest)
    parties = [*configs, *([PEER] if chosen.peer_python else [])]
    out = chosen.out.resolve()
    measured = out / "results"
    measured.mkdir(parents=True, exist_ok=True)
    if results := read_results(measured):
        report(results)
    for fold, channels, party in product(chosen.folds, chosen.channels, parties):
        key = Key(channels, fold, party, chosen.minutes)
        if (measured / file_of(key)).exists():
            continue
        manifest, folder = with_channels(whole, channels), out / channels.replace(",", "_")
        folder.mkdir(parents=True, exist_ok=True)
        save_manifest(manifest, folder / "manifest.json")
        if party == PEER:
            predicted, steps = run_peer(chosen.peer_python.absolute(), manifest, key, folder / f"fold_{fold}")
        else:
            predicted, steps = run_medseg(configs[party], folder / "manifest.json", key, out / "medseg" / party)
        of_cases = case_dice(manifest, manifest.validation_cases(fold), predicted)
        dice = {case: float(np.mean(list(found.values()))) for case, found in of_cases.items()}
        write_json(measured / file_of(key), asdict(Result(key, steps, dice)))
        report(read_results(measured))


if __name__ == "__main__":
    main()
