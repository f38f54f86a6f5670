"""How the cost of training grows with the number of cases: an epoch of as many steps, from memory and from disk.

Each line is a process of its own: what it takes to begin, the seconds of an epoch and where they went, and the peak of
resident memory. The cases are hard links to a few prepared ones, so that thousands cost no disk: reading them measures
decompression and memory, not the speed of the disk. Validation is left out: it takes its time a case by definition.

    python benchmarks/cost_growth.py [--cases 10 100 1000] [--size 128] [--steps 20] [--patch 48] [--device cuda]
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from synthetic import ct_phantom, ct_plan, grid, untrained_model

from pipeline.config import Config, DataSection, NetworkSection
from pipeline.data.manifest import Case, ImageFile, Manifest
from pipeline.data.store import CaseStore, PreparedCase
from pipeline.hardware import keep_freed_memory, pick_device
from pipeline.stages.fold.task import FoldTask
from pipeline.training.diagnosis.advice import spoken
from pipeline.training.diagnosis.stopwatch import Stopwatch
from pipeline.training.loop import train_step
from pipeline.training.sampling.cases import Place

CLASSES = 3
# Prepared cases that differ; the others are links to them.
DISTINCT = 4
SPACING_MM = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Setting:
    """What is measured in one process."""

    folder: Path
    cases: int
    place: Place
    patch: int
    steps: int
    device: str


@dataclass(frozen=True)
class Measured:
    """What it took."""

    start_s: float
    epoch_s: float
    peak_bytes: int
    phases: Mapping[str, float]


@dataclass(frozen=True)
class PlacedTask(FoldTask):
    """A fold whose cases are kept where they are told to be."""

    place: Place = "memory"

    @property
    def cases_at(self) -> Place:
        """Where the prepared training cases are kept."""
        return self.place


def names(count: int) -> list[str]:
    return [f"case_{number:05d}" for number in range(count)]


def write_store(folder: Path, count: int, size: int) -> None:
    """Write a few prepared cases, and link the others to them."""
    store, body = CaseStore(folder), ct_phantom((size,) * 3)
    at = grid((size,) * 3, SPACING_MM)
    for number, case in enumerate(names(count)):
        if number >= DISTINCT:
            link(folder / names(DISTINCT)[number % DISTINCT], folder / case)
            continue
        hu = np.roll(body, number * size // DISTINCT, axis=1)
        label = np.digitize(hu[0], (0.0, 150.0)).astype(np.uint8)
        voxels = {index: np.argwhere(label == index)[:: size // 8].astype(np.int32) for index in range(1, CLASSES)}
        image = (hu / 100).astype(np.float16)
        store.write(case, PreparedCase(image, label, label, at, at, voxels, ("CT",)), key="")


def link(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        os.link(file, target / file.name)


def task_of(setting: Setting) -> FoldTask:
    """Return the training of the default network on the first cases of the store; all of them are trained on."""
    plan = ct_plan(CLASSES, SPACING_MM, setting.patch)
    cases = tuple(
        Case(id=name, patient=name, images={"CT": ImageFile(path=name)}, label=ImageFile(path=name), fold=1)
        for name in names(setting.cases)
    )
    manifest = Manifest(name="growth", root=setting.folder, channels={"CT": "CT"}, labels=plan.labels, cases=cases)
    data = DataSection(manifest=setting.folder / "none.json")
    config = Config(name="growth", data=data, workspace=setting.folder, network=NetworkSection(options={"width": 8}))
    fingerprint = untrained_model(plan, {"width": 8}).fingerprint
    store, device = CaseStore(setting.folder / "cases"), pick_device(setting.device)
    return PlacedTask(config, manifest, plan, fingerprint, store, setting.folder, 0, device, setting.place)


def measure(setting: Setting) -> Measured:
    """Train one epoch, after a few steps that are not counted."""
    keep_freed_memory()
    begun = time.perf_counter()
    task = task_of(setting)
    state, clock = task.new_state(), Stopwatch(task.device)
    batches = task.batches(state.network, clock)
    schedule = task.schedule(state)

    def steps(number: int) -> None:
        for _ in range(number):
            train_step(state, batches, schedule(0, 1), task.settings, clock)
        state.sums.loss.item()  # waits for the device

    steps(1)
    start_s = time.perf_counter() - begun
    steps(2)
    clock.read()
    begun = time.perf_counter()
    steps(setting.steps)
    epoch_s = time.perf_counter() - begun
    batches.close()
    return Measured(start_s, epoch_s, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, clock.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--size", type=int, default=128, help="voxels along each axis of a case")
    parser.add_argument("--patch", type=int, default=48, help="voxels along each axis of a patch")
    parser.add_argument("--steps", type=int, default=20, help="of an epoch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where the store is written, for the while")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
        folder = Path(temporary)
        write_store(folder / "cases", max(chosen.cases), chosen.size)
        print(
            f"{chosen.steps} steps of cases of {chosen.size}^3 voxels, patches of {chosen.patch}^3, on {chosen.device}"
        )
        places: tuple[Place, ...] = ("memory", "disk")
        for place in places:
            measured = []
            for count in chosen.cases:
                setting = Setting(folder, count, place, chosen.patch, chosen.steps, chosen.device)
                # A process of its own: the peak of one is not that of the one before.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    found = process.submit(measure, setting).result()
                measured.append(found)
                print(
                    f"{place:6}  {count:5d} cases: begins in {found.start_s:5.1f} s, epoch {found.epoch_s:6.1f} s, "
                    f"peak {found.peak_bytes / 1e9:5.2f} GB; {spoken(found.phases)}"
                )
            first, last = measured[0], measured[-1]
            print(
                f"{place:6}  {chosen.cases[-1]} cases over {chosen.cases[0]}: epoch {last.epoch_s / first.epoch_s:.2f} "
                f"times, peak {last.peak_bytes / first.peak_bytes:.2f} times"
            )


if __name__ == "__main__":
    main()
