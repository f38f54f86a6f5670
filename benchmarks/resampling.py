"""Resampling of an image and a label map: ours beside SimpleITK and scipy on the same grid, interleaved.

Run: python benchmarks/resampling.py [--size 200] [--onto 300] [--rounds 3]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.geometry import Geometry
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--onto", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(THREADS)
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
