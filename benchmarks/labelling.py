"""Logits to the native label map: ours, streaming, beside plain torch's "interpolate all K volumes, then argmax".

Both get the same logits of a phantom of K - 1 organs on a 1.5 mm grid and label a native grid of 0.7 x 0.7 x 1.0 mm,
each in a process of its own; making the logits is not counted. Memory is the peak beyond what was there before (for
torch: beyond the logits). Both are compared with the argmax in float64. Needs Linux.

Run: python benchmarks/labelling.py [--native 256 256 150] [--classes 3 25] [--skip-torch]
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.geometry import Geometry
from pipeline.inference.labelling import label_from_planes
from pipeline.inference.planes import LogitPlanes
from pipeline.volumes.axes import axis_maps

AXIS = 2
Result = tuple[NDArray[np.uint8], float, float]  # labels, seconds, MB at the peak beyond the input


class Phantom:
    """Organs as ellipsoids; a class' logit falls with the distance from its centre, plus noise of a network's kind."""

    def __init__(self, num_classes: int, native: Geometry) -> None:
        random = np.random.default_rng(num_classes)
        self.native = native
        self.prepared = native.respaced((1.5, 1.5, 1.5))
        self.centres = random.uniform(0.1, 0.9, (num_classes - 1, 3)) * self.prepared.shape
        self.radii = random.uniform(0.5, 1.0, (num_classes - 1, 3)) * np.mean(self.prepared.shape) * 0.55
        self.radii /= num_classes ** (1 / 3)

    def plane(self, index: int) -> NDArray[np.float32]:
        """Return (K, A, B) logits of one plane along AXIS."""
        squares = [
            ((np.arange(n)[None] - self.centres[:, a, None]) / self.radii[:, a, None]) ** 2
            for a, n in enumerate(self.prepared.shape)
        ]
        organs = 4 * (1 - squares[0][:, :, None] - squares[1][:, None, :] - squares[2][:, index, None, None])
        logits = np.concatenate([np.zeros_like(organs[:1]), organs.clip(-12, 12)]).astype(np.float32)
        return logits + np.random.default_rng(index).normal(0, 0.02, logits.shape).astype(np.float32)


def peak_mb(*, afresh: bool = False) -> float:
    """Return the peak of this process' resident memory, since its start or since it was last asked for afresh."""
    if afresh:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def ours(phantom: Phantom) -> Result:
    making = 0.0

    def planes() -> Iterator[LogitPlanes]:
        nonlocal making
        for index in range(phantom.prepared.shape[AXIS]):
            start = time.perf_counter()
            handed = LogitPlanes(index, torch.from_numpy(phantom.plane(index)[:, None]))
            making += time.perf_counter() - start
            yield handed

    phantom.plane(0)
    before, start = peak_mb(afresh=True), time.perf_counter()
    labels = label_from_planes(planes(), axis=AXIS, prepared=phantom.prepared, native=phantom.native)
    return labels, time.perf_counter() - start - making, peak_mb() - before


def plain_torch(phantom: Phantom) -> Result:
    torch.set_num_threads(2)
    logits = torch.from_numpy(np.stack([phantom.plane(i) for i in range(phantom.prepared.shape[AXIS])], axis=-1))[None]
    before, start = peak_mb(afresh=True), time.perf_counter()
    volumes = torch.nn.functional.interpolate(logits, phantom.native.shape, mode="trilinear", align_corners=False)
    labels = volumes[0].argmax(0).to(torch.uint8).numpy()
    return labels, time.perf_counter() - start, peak_mb() - before


def in_float64(phantom: Phantom) -> Result:
    """Interpolate all K volumes in float64, a native plane at a time; neither time nor memory is of interest."""
    maps = axis_maps(phantom.prepared, phantom.native)
    assert maps is not None
    rows, columns, along = maps
    labels = np.empty(phantom.native.shape, np.uint8)
    for index in range(phantom.native.shape[AXIS]):
        lower, upper = (phantom.plane(int(i[index])).astype(np.float64) for i in (along.lower, along.upper))
        plane = (1 - along.weight[index]) * lower + along.weight[index] * upper
        for axis, m in ((1, rows), (2, columns)):
            weight = m.weight.reshape(-1, 1) if axis == 1 else m.weight
            plane = (1 - weight) * plane.take(m.lower, axis) + weight * plane.take(m.upper, axis)
        labels[:, :, index] = plane.argmax(0)
    return labels, 0.0, 0.0


def ambiguous_share(phantom: Phantom) -> float:
    """Return the share of cells of the plan's grid whose eight corners are not of one class."""
    classes = np.stack([phantom.plane(i).argmax(0) for i in range(phantom.prepared.shape[AXIS])], axis=-1)
    low = high = classes
    for axis in range(3):
        n = classes.shape[axis]
        low = np.minimum(low.take(range(n - 1), axis), low.take(range(1, n), axis))
        high = np.maximum(high.take(range(n - 1), axis), high.take(range(1, n), axis))
    return float((low != high).mean())


def apart(function: Callable[[Phantom], Result], phantom: Phantom) -> Result:
    """Run in a fresh process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, phantom).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", type=int, nargs=3, default=[256, 256, 150], help="shape of the native grid")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 25])
    parser.add_argument("--skip-torch", action="store_true", help="where K float32 volumes do not fit")
    options = parser.parse_args()
    native = Geometry(tuple(options.native), np.diag([0.7, 0.7, 1.0, 1.0]))
    for num_classes in options.classes:
        phantom = Phantom(num_classes, native)
        print(f"K = {num_classes}: {phantom.prepared} -> {native}; {ambiguous_share(phantom):.1%} of cells ambiguous")
        exact = apart(in_float64, phantom)[0]
        labels, seconds, peak = apart(ours, phantom)
        print(f"  ours         {seconds:7.2f} s  {peak:8.0f} MB  {(labels != exact).sum()} voxels differ from float64")
        if not options.skip_torch:
            peer_labels, peer_seconds, peer_peak = apart(plain_torch, phantom)
            differing = (peer_labels != exact).sum()
            print(f"  plain torch  {peer_seconds:7.2f} s  {peer_peak:8.0f} MB  {differing} voxels differ from float64")
            print(f"  ours takes {seconds / peer_seconds:.2f} of the time, {peak / peer_peak:.3f} of the memory")


if __name__ == "__main__":
    main()
