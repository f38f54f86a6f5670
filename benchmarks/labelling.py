"""Logits to the native label map: ours, plane by plane, beside two ways that interpolate all K volumes first.

    python benchmarks/labelling.py                                                 # beside plain torch
    python benchmarks/labelling.py --classes 25 --peer-python .peers/nnunet/bin/python     # and beside nnU-Net's export
    python benchmarks/labelling.py --classes 118 --skip-torch                      # where K volumes don't fit
    python benchmarks/labelling.py --classes 25 --skip-torch --probabilities 1 2   # on request

All get the same float32 logits of a phantom of 117 organs in K - 1 classes on a 1.5 mm grid and label a native grid of
0.7 x 0.7 x 1.0 mm, each in a process of its own, on --threads threads; making the logits is not counted. Memory is the
peak beyond what was there before: for ours that is the label map, the plane handed in and all that is done with it, for
the others all beyond the logits. Each label map is compared with the decision in float64; a voxel is a near-tie where
its two largest logits differ by less than 1e-5 of the larger, or of 1 where both are smaller. Needs Linux;
peers/nnunet.txt makes the peer's environment.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from side_by_side import PEERS, memory_mb, run_apart

from pipeline.geometry import Geometry
from pipeline.inference.labelling import label_from_planes
from pipeline.inference.planes import LogitPlanes
from pipeline.inference.probabilities import ProbabilityRequest
from pipeline.volumes.axes import axis_maps
from pipeline.volumes.plane_writing import PlaneWriter

AXIS = 2
ORGANS = 117
SPACING_MM, NATIVE_SPACING_MM = (1.5, 1.5, 1.5), (0.7, 0.7, 1.0)
NEAR_TIE = 1e-5

Labels = NDArray[np.uint8]


@dataclass(frozen=True)
class Result:
    """What a party made, and what it took."""

    labels: Labels
    seconds: float
    cpu_s: float  # of all threads: what a busy machine changes least
    peak_mb: float


class Phantom:
    """Organs as ellipsoids; a class' logit falls with the distance from its nearest organ, plus a network's noise."""

    def __init__(self, num_classes: int, native: Geometry) -> None:
        random = np.random.default_rng(0)
        self.num_classes = num_classes
        self.native = native
        self.prepared = native.respaced(SPACING_MM)
        shape = np.array(self.prepared.shape)
        centres = random.uniform(0.1, 0.9, (ORGANS, 3)) * shape
        radii = random.uniform(0.06, 0.13, (ORGANS, 3)) * shape
        self.squares = [
            (((np.arange(n) - centres[:, a, None]) / radii[:, a, None]) ** 2).astype(np.float32)
            for a, n in enumerate(self.prepared.shape)
        ]

    def plane(self, index: int) -> NDArray[np.float32]:
        """Return (K, A, B) logits of one plane along AXIS, made in little memory."""
        rows, columns, along = self.squares
        logits = np.full((self.num_classes, *self.prepared.shape[:2]), -12, np.float32)
        logits[0] = 0
        for organ in range(ORGANS):
            inside = 4 * (1 - along[organ, index] - rows[organ][:, None] - columns[organ])
            into = logits[1 + organ % (self.num_classes - 1)]
            np.maximum(into, inside.clip(-12, 12), out=into)
        random = np.random.default_rng(index)
        for plane in logits:
            plane += 0.02 * random.standard_normal(plane.shape, np.float32)
        return logits

    def planes(self) -> Iterator[NDArray[np.float32]]:
        """Yield all planes in order."""
        return map(self.plane, range(self.prepared.shape[AXIS]))

    def volumes(self, path: Path | None = None) -> NDArray[np.float32]:
        """Return (K, X, Y, Z) logits, in memory or in a file."""
        shape = (self.num_classes, *self.prepared.shape)
        logits = np.lib.format.open_memmap(path, "w+", np.float32, shape) if path else np.empty(shape, np.float32)
        for index, plane in enumerate(self.planes()):
            logits[..., index] = plane
        return logits


@dataclass
class Clock:
    """Wall and CPU seconds since the start of a measurement, less those of some blocks."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __enter__(self) -> None:
        self.wall_s, self.cpu_s = self.wall_s - time.perf_counter(), self.cpu_s - time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall_s, self.cpu_s = self.wall_s + time.perf_counter(), self.cpu_s + time.process_time()


def measured(label: Callable[[], Labels], making: Clock | None = None) -> Result:
    """Run once; what the clock `making` has counted is not counted here."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, begins anew
    before, whole, making = memory_mb("VmHWM"), Clock(), making or Clock()
    with whole:
        labels = label()
    peak_mb = memory_mb("VmHWM") - before
    return Result(labels, whole.wall_s - making.wall_s, whole.cpu_s - making.cpu_s, peak_mb)


def ours(threads: int, probabilities: tuple[int, ...], phantom: Phantom) -> Result:
    torch.set_num_threads(threads)
    making = Clock()

    def planes() -> Iterator[LogitPlanes]:
        for index in range(phantom.prepared.shape[AXIS]):
            with making:
                plane = torch.from_numpy(phantom.plane(index)[:, None])
            yield LogitPlanes(index, plane)

    def label(request: ProbabilityRequest | None = None) -> Labels:
        prepared, native = phantom.prepared, phantom.native
        return label_from_planes(planes(), axis=AXIS, prepared=prepared, native=native, probabilities=request)

    def label_and_write() -> Labels:
        with tempfile.TemporaryDirectory() as folder:
            path, volumes = Path(folder) / "probabilities.nii.gz", len(probabilities)
            with PlaneWriter(path, phantom.native, volumes=volumes, dtype="uint8", scale=1 / 255) as writer:
                return label(ProbabilityRequest(probabilities, writer.put))

    phantom.plane(0)
    return measured(label_and_write if probabilities else label, making)


def plain_torch(threads: int, phantom: Phantom) -> Result:
    torch.set_num_threads(threads)
    logits = torch.from_numpy(phantom.volumes())[None]

    def label() -> Labels:
        volumes = torch.nn.functional.interpolate(logits, phantom.native.shape, mode="trilinear", align_corners=False)
        return volumes[0].argmax(0).to(torch.uint8).numpy()

    return measured(label)


def nnunet_export(python: Path, threads: int, phantom: Phantom) -> Result:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        phantom.volumes(folder / "logits.npy").flush()
        spacing = {"spacing_mm": SPACING_MM, "native_spacing_mm": NATIVE_SPACING_MM}
        (folder / "grids.json").write_text(json.dumps({"shape": phantom.native.shape, **spacing}))
        answer = run_apart([python, PEERS / "nnunet_export.py", folder, threads]).answer
        return Result(np.load(folder / "labels.npy"), **answer)


def in_float64(phantom: Phantom) -> tuple[Labels, NDArray[np.bool_]]:
    """Return the labels of all logits interpolated in float64, native plane by plane, and where near-ties are."""
    maps = axis_maps(phantom.prepared, phantom.native)
    assert maps is not None
    rows, columns, along = maps
    labels, near = np.zeros(phantom.native.shape, np.uint8), np.zeros(phantom.native.shape, bool)
    planes = {0: phantom.plane(0)}
    for index in range(phantom.native.shape[AXIS]):
        around = (int(along.lower[index]), int(along.upper[index]))
        planes = {at: planes[at] if at in planes else phantom.plane(at) for at in around}
        best = np.full(labels.shape[:2], -np.inf)
        second = best.copy()
        for number, (low, high) in enumerate(zip(*(planes[at] for at in around), strict=True)):
            values = (1 - along.weight[index]) * low.astype(np.float64) + along.weight[index] * high
            weight = rows.weight[:, None]
            values = (1 - weight) * values.take(rows.lower, 0) + weight * values.take(rows.upper, 0)
            values = (1 - columns.weight) * values.take(columns.lower, 1) + columns.weight * values.take(
                columns.upper, 1
            )
            labels[..., index][values > best] = number
            second = np.maximum(second, np.minimum(best, values))
            best = np.maximum(best, values)
        near[..., index] = best - second < NEAR_TIE * np.maximum(1, np.maximum(abs(best), abs(second)))
    return labels, near


def ambiguous_share(phantom: Phantom) -> float:
    """Return the share of cells of the plan's grid whose eight corners are not of one class."""
    classes = np.stack([plane.argmax(0) for plane in phantom.planes()], axis=-1)
    low = high = classes
    for axis in range(3):
        n = classes.shape[axis]
        low = np.minimum(low.take(range(n - 1), axis), low.take(range(1, n), axis))
        high = np.maximum(high.take(range(n - 1), axis), high.take(range(1, n), axis))
    return float((low != high).mean())


def apart(function: Callable[[Phantom], Any], phantom: Phantom) -> Any:
    """Run in a fresh process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, phantom).result()


def report(options: argparse.Namespace, phantom: Phantom) -> None:
    """Measure all parties and print seconds, memory, differing voxels and ratios."""
    parties: dict[str, Callable[[], Result]] = {}
    parties["ours"] = partial(apart, partial(ours, options.threads, tuple(options.probabilities)), phantom)
    if not options.skip_torch:
        parties["plain torch"] = partial(apart, partial(plain_torch, options.threads), phantom)
    if options.peer_python:
        parties["nnU-Net's export"] = partial(nnunet_export, options.peer_python, options.threads, phantom)
    labels, near = apart(in_float64, phantom)
    results: dict[str, Result] = {}
    for name, run in parties.items():
        repeats = [run() for _ in range(options.repeats if name == "ours" else 1)]
        result = results[name] = sorted(repeats, key=lambda repeat: repeat.seconds)[len(repeats) // 2]
        differing = result.labels != labels
        print(
            f"  {name:16s} {result.seconds:8.2f} s, {result.cpu_s:8.2f} s of CPU, {result.peak_mb:8.0f} MB; "
            f"{differing.sum()} voxels differ from float64, {(differing & near).sum()} of them near-ties",
            flush=True,
        )
    mine = results.pop("ours")
    for name, peer in results.items():
        print(
            f"  {name}: {peer.seconds / mine.seconds:.1f} x our time, {peer.cpu_s / mine.cpu_s:.1f} x our CPU time, "
            f"{peer.peak_mb / mine.peak_mb:.1f} x our memory"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", type=int, nargs=3, default=[512, 512, 300], help="shape of the native grid")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 25])
    parser.add_argument("--probabilities", type=int, nargs="*", default=[], help="classes whose ours writes besides")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of ours; the median counts")
    parser.add_argument("--skip-torch", action="store_true", help="where K float32 volumes do not fit")
    parser.add_argument("--peer-python", type=Path, help="an interpreter with nnunetv2, to run its export beside")
    options = parser.parse_args()
    native = Geometry(tuple(options.native), np.diag([*NATIVE_SPACING_MM, 1.0]))
    for num_classes in options.classes:
        phantom = Phantom(num_classes, native)
        share = ambiguous_share(phantom)
        print(f"K = {num_classes}: {phantom.prepared} -> {native}; {share:.1%} of cells ambiguous", flush=True)
        report(options, phantom)


if __name__ == "__main__":
    main()
