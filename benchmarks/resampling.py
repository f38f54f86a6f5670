"""Resampling of an image and a label map: ours beside SimpleITK and scipy on the same grid, interleaved.

    python benchmarks/resampling.py [--size 200] [--onto 300] [--rounds 3]
    python benchmarks/resampling.py --memory   # 512x512x800, and what preparation takes at 300 and 1,600 slices (Linux)

The memory is the peak of the process above its input and its result.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.data.plan import Normalisation, Plan
from pipeline.geometry import Geometry
from pipeline.preparation.preprocessing import prepare_images
from pipeline.volumes.resampling import Order, resample_image, resample_label
from pipeline.volumes.volume import Volume

THREADS = 2
Image = NDArray[np.float32]


def with_simpleitk(image: Volume, onto: Geometry, order: Order) -> Image:
    """Both grids are parallel to the world's axes, so RAS+ and LPS differ in nothing that matters here."""
    source = sitk.GetImageFromArray(image.array[0].T)
    source.SetSpacing(image.geometry.spacing_mm)
    resampler = sitk.ResampleImageFilter()
    resampler.SetInterpolator(sitk.sitkLinear if order == 1 else sitk.sitkBSpline)
    resampler.SetOutputSpacing(onto.spacing_mm)
    resampler.SetOutputOrigin(onto.affine[:3, 3].tolist())
    resampler.SetSize(onto.shape)
    return sitk.GetArrayFromImage(resampler.Execute(source)).T


def with_scipy(image: Volume, onto: Geometry, order: Order) -> Image:
    scale, offset = np.diag(onto.affine)[:3], onto.affine[:3, 3]
    return ndimage.affine_transform(image.array[0], scale, offset, onto.shape, order=order, mode="mirror")


def ours(image: Volume, onto: Geometry, order: Order) -> Image:
    return resample_image(image, onto, order=order).array[0]


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(image: Volume, onto: Geometry, order: Order, rounds: int) -> None:
    """Print medians, ratios, and the largest difference between the outer voxel centres, relative to the range."""
    ways = {"ours": ours, "SimpleITK": with_simpleitk, "scipy": with_scipy}
    results = {name: way(image, onto, order) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(lambda way=way: way(image, onto, order)))
    mine = statistics.median(times["ours"])
    print("linear" if order == 1 else "cubic B-spline")
    inner = (slice(2, -2),) * 3
    for name, result in results.items():
        median = statistics.median(times[name])
        difference = np.abs(results["ours"] - result)[inner].max() / np.ptp(image.array)
        print(f"  {name:10} {median:6.2f} s   ours takes {mine / median:5.2f} of it   differs by {difference:.1e}")


def measured(label: str, function: Callable[[], Image]) -> None:
    """Print seconds, and the peak of resident memory above what there is before and the result."""
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    start = time.perf_counter()
    result = function()
    took = time.perf_counter() - start
    above = status_mib("VmHWM") - before - result.nbytes / 2**20
    print(
        f"  {label}: {took:.2f} s, result {result.nbytes / 2**20:.0f} MiB, peak {above:+.0f} MiB above input and result"
    )


def status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def ct(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Volume:
    """A head-first CT of noise within a frame of air, as a scanner's LPS grid."""
    rng = np.random.default_rng(0)
    array = np.zeros((1, *shape), np.float32)
    for plane in array[0, shape[0] // 10 : -shape[0] // 10]:
        plane[:] = rng.standard_normal(plane.shape, np.float32) * 100
    return Volume(array, Geometry(shape, np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])))


def plan_of(normalisation: Normalisation) -> Plan:
    return Plan(
        channels={"x": "CT" if normalisation.scheme == "ct" else "MR"},
        labels={"background": 0, "organ": 1},
        orientation="RAS",
        spacing_mm=(1.5, 1.5, 1.5),
        crop="nonzero",
        patch_size=(96, 96, 96),
        batch_size=2,
        normalisation={"x": normalisation},
    )


def prepared(image: Volume, plan: Plan) -> Image:
    return prepare_images({"x": image}, plan, image.geometry).array


def report_memory() -> None:
    """Print what long volumes take."""
    image = ct((512, 512, 800), (0.8, 0.8, 1.5))
    for orientation in ("LPS", "SPL"):
        onto = image.geometry.reoriented(orientation).respaced((1.5, 1.5, 1.5))
        resample_image(Volume(image.array[:, :8, :8, :8], image.geometry.cropped((0, 0, 0), (8, 8, 8))), onto)
        print(f"{image.geometry} -> {onto}")
        for order in (1, 3):
            measured("linear" if order == 1 else "cubic ", partial(ours, image, onto, order))
    for scheme in (
        Normalisation(scheme="ct", low=-200, high=300, mean=0, std=100),
        Normalisation(scheme="zscore_nonzero"),
    ):
        for slices in (300, 1600):
            long = ct((256, 256, slices), (1.2, 1.2, 1.5))
            print(f"preparation, {scheme.scheme}, {long.geometry}")
            measured("to 1.5 mm", partial(prepared, long, plan_of(scheme)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--onto", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(THREADS)
    if options.memory:
        report_memory()
        return
    grid = Geometry((options.size,) * 3, np.eye(4))
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=grid.shape).astype(np.float32), 3)
    image, onto = Volume(smooth[None], grid), grid.respaced((options.size / options.onto,) * 3)
    print(f"{grid} -> {onto}, {THREADS} threads, median of {options.rounds}")
    for order in (1, 3):
        compare(image, onto, order, options.rounds)
    blobs = ndimage.gaussian_filter(smooth, 8)
    label = Volume(np.digitize(blobs, np.quantile(blobs, [0.5, 0.7, 0.9, 0.97])).astype(np.uint8), grid)
    median = statistics.median(seconds(lambda: resample_label(label, onto)) for _ in range(options.rounds))
    print(f"label map of 5 classes, ours: {median:.2f} s")


if __name__ == "__main__":
    main()
