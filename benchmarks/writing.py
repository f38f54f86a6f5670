"""Label maps and images as .nii.gz: our writer and reader beside nibabel's, on the same volumes, interleaved.

Both write at level 1. The organs are ellipsoids over a sixth of the volume; the image is noise as wide as a CT's, which
compresses to about half.

Run: python benchmarks/writing.py [--slices 800] [--rounds 3]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import Geometry
from pipeline.volumes.formats import streams
from pipeline.volumes.formats.layout import copy_into
from pipeline.volumes.volume import Volume, read_image
from pipeline.volumes.writing import write_label

CLASSES = 117


def organs(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return ellipsoids of the values 1 to 117, in C order, as a segmentation lies in memory."""
    random = np.random.default_rng(0)
    label = np.zeros(shape, np.uint8)
    for value in range(1, CLASSES + 1):
        centre, radii = random.random(3) * shape, np.array(shape) * random.uniform(0.03, 0.12, 3)
        box = tuple(slice(max(0, int(c - r)), int(c + r) + 2) for c, r in zip(centre, radii, strict=True))
        axes = np.ogrid[tuple(slice(s.start, min(s.stop, n)) for s, n in zip(box, shape, strict=True))]
        inside = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii, strict=True)) < 1
        label[box][inside] = value
    return label


def noise(shape: tuple[int, int, int]) -> NDArray[np.int16]:
    """Return a CT's noise."""
    image = np.empty(shape, np.int16)
    random = np.random.default_rng(1)
    for plane in range(shape[0]):
        image[plane] = random.normal(40, 25, shape[1:])
    return image


def by_nibabel(path: Path, array: NDArray[Any]) -> None:
    nib.Nifti1Image(array, np.eye(4)).to_filename(path)


def by_nibabel_in_file_order(path: Path, array: NDArray[Any]) -> None:
    """Turn the axes by our copy first: what is left is nibabel's compression."""
    turned = np.empty(array.shape, array.dtype, order="F")
    copy_into(turned, array)
    by_nibabel(path, turned)


def read_by_nibabel(path: Path) -> NDArray[np.float32]:
    return np.ascontiguousarray(nib.load(path).get_fdata(dtype=np.float32, caching="unchanged"))


def compare(title: str, ways: dict[str, Callable[[], object]], rounds: int) -> None:
    """Print the median seconds of each way, and of the first its median share of each other's."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    ours = next(iter(taken.values()))
    print(title)
    for name, seconds in taken.items():
        share = statistics.median(a / b for a, b in zip(ours, seconds, strict=True))
        print(f"  {name:32} {statistics.median(seconds):7.3f} s   ours takes {share:5.2f} of it")


def main() -> None:
    """Compare writing of the label map, then reading of the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shape = (512, 512, options.slices)
    grid = Geometry(shape, np.eye(4))
    print(f"gzip by {streams.codec.__name__}; {shape[0]}x{shape[1]}x{shape[2]}, median of {options.rounds}")
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs, image = (Path(folder) / name for name in ("ours.nii.gz", "nibabel.nii.gz", "image.nii.gz"))
        label = organs(shape)
        writers: dict[str, Callable[[], object]] = {
            "ours": lambda: write_label(mine, Volume(label, grid)),
            "nibabel": lambda: by_nibabel(theirs, label),
            "nibabel, axes turned by ours": lambda: by_nibabel_in_file_order(theirs, label),
        }
        compare("write a label map of organs", writers, options.rounds)
        print(f"  {mine.stat().st_size / 1e6:.1f} MB, nibabel's {theirs.stat().st_size / 1e6:.1f} MB")
        short = (*shape[:2], min(300, options.slices))
        by_nibabel(image, noise(short))
        readers: dict[str, Callable[[], object]] = {
            "ours": lambda: read_image(image),
            "nibabel": lambda: read_by_nibabel(image),
        }
        compare(f"read int16 noise of {short[2]} slices as float32", readers, options.rounds)


if __name__ == "__main__":
    main()
