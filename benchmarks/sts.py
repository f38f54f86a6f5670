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
normalisation). nnU-Net's minutes do not hold its planning, preprocessing and the ten steps that measure its speed.

OUT/results.json holds what is measured, each fold as it lands; the same command goes on with what is missing.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from peer_training import case_dice, train_peer, write_cases
from side_by_side import medseg, train_or_go_on

from pipeline.config_loading import load_config
from pipeline.data.manifest import Manifest, load_manifest, save_manifest

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
    """What came of it: the Dice of each patient of the fold, the mean over the structures."""

    key: Key
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


def run_medseg(config: Path, manifest: Path, key: Key, workspace: Path) -> Path:
    """Train by the command line, and return the folder of the last model's label maps of the fold held out."""
    name = f"{key.party}_{key.channels.replace(',', '_')}_{key.minutes:g}_minutes"
    changes = [f"name={name}", f"data.manifest={manifest}", f"training.budget={{minutes: {key.minutes}}}"]
    options = [config, "--workspace", workspace, *(part for change in changes for part in ("--set", change))]
    medseg("preprocess", *options)
    run = workspace / "runs" / name / f"fold_{key.fold}"
    train_or_go_on(options, run, key.fold)
    medseg("evaluate", run / "models" / "last", "--workspace", workspace)
    return run / "evaluation" / "fold_last" / "predictions"


def run_peer(python: Path, manifest: Manifest, key: Key, folder: Path) -> Path:
    """Train in the peer's environment, and return the folder of its label maps."""
    write_cases(manifest, key.fold, folder)
    (kept,) = train_peer(PEER, python, folder, key.minutes, count=1)
    return Path(kept.folder)


def report(results: list[Result]) -> None:
    """Print a line for each party and set of channels: its folds, the mean over all their patients, the folds' SD."""
    folds = sorted({result.key.fold for result in results})
    print(f"{'':48}" + "".join(f"  fold {fold}" for fold in folds) + "    mean      SD  patients")
    for line, of_folds in by_line(results):
        cells = "".join(f"{of_folds[fold].mean:8.4f}" if fold in of_folds else f"{'-':>8}" for fold in folds)
        dice = [value for result in of_folds.values() for value in result.dice.values()]
        means = [result.mean for result in of_folds.values()]
        sd = f"{np.std(means, ddof=1):8.4f}" if len(means) > 1 else f"{'-':>8}"
        print(f"{line:48}{cells}{np.mean(dice):8.4f}{sd}{len(dice):10}", flush=True)


def by_line(results: list[Result]) -> Iterator[tuple[str, dict[int, Result]]]:
    """Yield what belongs into one line of the table: a title, and the result of each fold."""
    lines: dict[str, dict[int, Result]] = {}
    for result in results:
        key = result.key
        lines.setdefault(f"{key.channels}, {key.minutes:g} min: {key.party}", {})[key.fold] = result
    yield from sorted(lines.items())


def read_results(path: Path) -> list[Result]:
    """Return what is measured already."""
    found = json.loads(path.read_text()) if path.exists() else []
    return [Result(Key(**one["key"]), one["dice"]) for one in found]


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
    results = read_results(out / "results.json")
    if results:
        report(results)
    for fold, channels, party in product(chosen.folds, chosen.channels, parties):
        key = Key(channels, fold, party, chosen.minutes)
        if any(result.key == key for result in results):
            continue
        manifest, folder = with_channels(whole, channels), out / channels.replace(",", "_")
        folder.mkdir(parents=True, exist_ok=True)
        save_manifest(manifest, folder / "manifest.json")
        if party == PEER:
            predicted = run_peer(chosen.peer_python.absolute(), manifest, key, folder / f"fold_{fold}")
        else:
            predicted = run_medseg(configs[party], folder / "manifest.json", key, out / "medseg")
        of_cases = case_dice(manifest, manifest.validation_cases(fold), predicted)
        results.append(Result(key, {case: float(np.mean(list(dice.values()))) for case, dice in of_cases.items()}))
        (out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
        report(results)


if __name__ == "__main__":
    main()
