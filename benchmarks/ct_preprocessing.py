"""Preparing one full-size CT from files to arrays: seconds and peak memory beside nnU-Net's `DefaultPreprocessor`.

    python benchmarks/ct_preprocessing.py --peer-python .peers/nnunet/bin/python [--shape 512 512 300] [--threads 1]

Image and label are read, resampled (the image by cubic splines, the label linearly) and normalised, and foreground is
sampled: `prepare_case` against `run_case`, each in a process of its own, on the same uncompressed files. Memory is the
peak beyond the libraries. The scan is a phantom with noise. nnU-Net does not smooth before it takes every second voxel,
medseg does: so the images differ, and the mean absolute difference is stated, in HU. Wanted: at most a quarter of the
time and half of the memory.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from side_by_side import PEERS, Finished, memory_mb, run_apart
from synthetic import ct_phantom, ct_plan, grid

from pipeline.preparation.preprocessing import prepare_case
from pipeline.volumes.volume import Volume, read_image, read_label
from pipeline.volumes.writing import write_image, write_label

CLASSES = 3
# From and to, in mm.
WAYS = ((0.7, 1.5), (1.5, 1.0))
TIME, MEMORY = 0.25, 0.5


def write_case(folder: Path, hu: NDArray[np.float32], spacing_mm: float, onto_mm: float) -> None:
    """Write the scan, its label, and the plan as the peer reads it."""
    geometry = grid(hu.shape[1:], (spacing_mm,) * 3)
    write_image(folder / "image.nii", Volume(hu.astype(np.int16), geometry))
    write_label(folder / "label.nii", Volume(np.digitize(hu[0], (75.0, 150.0)).astype(np.uint8), geometry))
    plan = ct_plan(CLASSES, (onto_mm,) * 3)
    scheme = plan.normalisation["CT"].model_dump(exclude={"scheme"})
    facts = {"spacing_mm": onto_mm, "labels": plan.labels, **scheme}
    (folder / "plan.json").write_text(json.dumps(facts))


def ours(folder: Path) -> None:
    """Prepare the case in this process, and print what it took."""
    onto_mm = json.loads((folder / "plan.json").read_text())["spacing_mm"]
    plan = ct_plan(CLASSES, (onto_mm,) * 3)
    Path("/proc/self/clear_refs").write_text("5")
    before, start, cpu_start = memory_mb("VmHWM"), time.perf_counter(), time.process_time()
    image, label = read_image(folder / "image.nii"), read_label(folder / "label.nii")
    prepared = prepare_case({"CT": image}, label, plan, label.geometry)
    seconds, cpu_s, peak = time.perf_counter() - start, time.process_time() - cpu_start, memory_mb("VmHWM") - before
    np.save(folder / "medseg.npy", prepared.image[0])
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "peak_mb": peak}))


def difference_hu(folder: Path) -> str:
    """Return how far the two images are apart, where they are of one shape."""
    mine, theirs = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("medseg", "nnunet"))
    if mine.shape != theirs.shape:
        return f"shapes differ: {mine.shape} and {theirs.shape}"
    std = json.loads((folder / "plan.json").read_text())["std"]
    apart = np.mean([np.abs(a.astype(np.float32) - b).mean() for a, b in zip(mine, theirs, strict=True)])
    return f"mean absolute difference {apart * std:.2f} HU over {mine.shape}"


def line(name: str, found: Finished) -> str:
    took = found.answer
    return f"  {name:8} {took['seconds']:7.2f} s ({took['cpu_s']:.2f} s of CPU), peak {took['peak_mb']:6.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.ours:
        ours(chosen.ours)
        return
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    hu = ct_phantom(tuple(chosen.shape))
    for spacing_mm, onto_mm in WAYS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_case(folder, hu, spacing_mm, onto_mm)
            print(f"{'x'.join(map(str, chosen.shape))}, {spacing_mm} to {onto_mm} mm, {chosen.threads} threads")
            mine = run_apart([sys.executable, __file__, "--ours", folder])
            print(line("medseg", mine))
            if chosen.peer_python is None:
                continue
            theirs = run_apart([chosen.peer_python, PEERS / "nnunet_preprocessing.py", folder])
            print(line("nnU-Net", theirs))
            share = {key: mine.answer[key] / value for key, value in theirs.answer.items()}
            print(
                f"  medseg takes {share['seconds']:.2f} of the time (wanted {TIME}), {share['cpu_s']:.2f} of the CPU, "
                f"and {share['peak_mb']:.2f} of the memory (wanted {MEMORY}); {difference_hu(folder)}"
            )


if __name__ == "__main__":
    main()
