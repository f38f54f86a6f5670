"""Cases per hour of `medseg segment` and of nnU-Net's predictor: the same volumes, network and weights, start-up apart.

    python benchmarks/cases_per_hour.py
        --peer-python .peers/nnunet/bin/python --data DATA [--hippocampus MODEL] [--sts MODEL]

DATA holds Task04_Hippocampus/ (the first 60 volumes are taken) and STS/ (every MR volume); a set that isn't there is
skipped. MODEL is a trained model of one MR channel and medseg's plain `unet`; without one the network has random
weights, which costs the same. Both parties read and write .nii.gz in processes of their own, in turns; nnU-Net by both
its roads (peers/predict_cases.py), of which the faster counts. Cases per hour are counted from the first label map
written to the last, so that start-up is apart from both; the whole command is stated too.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from side_by_side import MEDSEG, PEERS, export_unet, run_apart
from synthetic import untrained_model, untrained_plan

from pipeline.data.plan import Normalisation
from pipeline.hardware import pick_device
from pipeline.model import load_model, save_model
from pipeline.volumes.volume import read_label

OURS, ROADS = "medseg", ("nnunet_files", "nnunet_sequential")
MOST = 60


@dataclass(frozen=True)
class VolumeSet:
    """Where a set's volumes are, and the plan of a model without training."""

    pattern: str
    spacing_mm: tuple[float, float, float]
    patch_size: tuple[int, int, int]
    options: dict[str, object]
    thick_axis: int | None = None


SETS = {
    "hippocampus": VolumeSet(
        "Task04_Hippocampus/imagesTr/*.nii.gz", (1.0, 1.0, 1.0), (40, 56, 40), {"width": 16, "norm": "batch"}
    ),
    "sts": VolumeSet("STS/*/MR_*image.nii.gz", (0.976562, 0.976562, 3.27), (96, 96, 32), {"width": 16}, thick_axis=2),
}


@dataclass(frozen=True)
class Batch:
    """What one command did: cases per hour from the first result to the last, and of the whole command."""

    per_hour: float
    with_start: float


def make_folder(folder: Path, volumes: list[Path], model: Path | None, unlike: VolumeSet) -> None:
    """Lay out the images, the model for medseg, and the network and plan for nnU-Net."""
    (folder / "images").mkdir()
    for path in volumes:
        shutil.copyfile(path, folder / "images" / f"{path.parent.name}_{path.name}")
    if model:
        loaded = load_model(model, pick_device("cpu"))
    else:
        plan = untrained_plan(
            2,
            "MR",
            Normalisation(scheme="zscore"),
            unlike.spacing_mm,
            patch_size=unlike.patch_size,
            thick_axis=unlike.thick_axis,
        )
        loaded = untrained_model(plan, unlike.options)
    save_model(folder / "model", loaded)
    export_unet(loaded.network, folder)
    plan = loaded.plan
    labels = {name: index for index, name in enumerate(plan.labels)}
    for_peer = {"spacing_mm": plan.spacing_mm, "patch_size": plan.patch_size, "labels": labels}
    (folder / "plan.json").write_text(json.dumps(for_peer))


def run_batch(command: list[object], out: Path) -> Batch:
    """Run a command over all cases, into an empty folder."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    finished = run_apart(command)
    written = sorted(path.stat().st_mtime for path in out.glob("*.nii.gz"))
    return Batch(3600 * (len(written) - 1) / (written[-1] - written[0]), 3600 * len(written) / finished.seconds)


def alike(ours: Path, peer: Path) -> float:
    """Return the share of voxels that both label the same, over all cases."""
    equal = voxels = 0
    for path in ours.glob("*.nii.gz"):
        own, other = read_label(path).array, read_label(peer / path.name).array
        equal, voxels = equal + int((own == other).sum()), voxels + own.size
    return equal / voxels


def compare(name: str, volumes: list[Path], model: Path | None, peer_python: Path, rounds: int) -> None:
    """Print a line a party, and the ratio."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_folder(folder, volumes, model, SETS[name])
        commands: dict[str, list[object]] = {
            OURS: [*MEDSEG, "segment", folder / "images", "--model", folder / "model", "--out", folder / OURS]
        }
        script = PEERS / "predict_cases.py"
        commands |= {road: [peer_python, script, folder, road, folder / road] for road in ROADS}
        batches: dict[str, list[Batch]] = {party: [] for party in commands}
        for _ in range(rounds):
            for party, command in commands.items():
                batches[party].append(run_batch(command, folder / party))
        same = alike(folder / OURS, folder / ROADS[0])
    print(f"{name}: {len(volumes)} volumes, {'trained' if model else 'random'} weights, {same:.2%} of voxels alike")
    rates = {party: statistics.median(batch.per_hour for batch in runs) for party, runs in batches.items()}
    for party, runs in batches.items():
        whole = statistics.median(batch.with_start for batch in runs)
        print(f"  {party:18} {rates[party]:8.0f} cases/h; {whole:.0f} with start-up")
    faster = max(ROADS, key=lambda road: rates[road])
    ratios = sorted(a.per_hour / b.per_hour for a, b in zip(batches[OURS], batches[faster], strict=True))
    print(f"  {OURS} / {faster}: {statistics.median(ratios):.2f} times the cases per hour, median of {rounds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", choices=SETS)
    parser.add_argument("--most", type=int, default=MOST, help="volumes of a set")
    parser.add_argument("--rounds", type=int, default=1)
    for name in SETS:
        parser.add_argument(f"--{name}", type=Path, metavar="MODEL")
    options = parser.parse_args()
    for name in [options.only] if options.only else SETS:
        volumes = sorted(options.data.glob(SETS[name].pattern))[: options.most]
        if len(volumes) < 2:
            print(f"{name}: skipped, no volumes {options.data / SETS[name].pattern}")
            continue
        compare(name, volumes, getattr(options, name), options.peer_python, options.rounds)


if __name__ == "__main__":
    main()
