"""The patch classifier slid over a volume, patch by patch in batches, beside its dense form in one pass of one process.

Both decide the same voxels with the same weights, and the largest difference of their logits is printed. Seconds are
the median of several passes. Slid, the patches are views of the volume: only their copy into a batch counts.

Run: python benchmarks/patch_classifier.py [--output 24 24 24] [--batch 64] [--repeats 3]
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.networks.contract import NetworkTask
from pipeline.networks.patch_classifier import PatchClassifier, patch_classifier


def patches(image: Tensor, field: tuple[int, int, int], batch: int) -> Iterator[Tensor]:
    """Yield every patch of (1, C, X, Y, Z) in batches (N, C, *field)."""
    views = image[0]
    for axis, size in enumerate(field, start=1):
        views = views.unfold(axis, size, 1)  # at last (C, positions x, y, z, *field)
    positions = itertools.product(*map(range, views.shape[1:4]))
    while places := list(itertools.islice(positions, batch)):
        yield torch.stack([views[:, i, j, k] for i, j, k in places])


def slid(network: PatchClassifier, image: Tensor, batch: int) -> Tensor:
    """Return the logits (positions, K) of all patches."""
    return torch.cat([network.classify(several) for several in patches(image, network.field, batch)])


def dense(network: PatchClassifier, image: Tensor) -> Tensor:
    """Return the logits (positions, K) of one pass."""
    return network(image)[0].flatten(1).T


def timed(run: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float]:
    """Return what a run makes, and the median of its seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        logits = run()
        seconds.append(time.perf_counter() - start)
    return logits, statistics.median(seconds)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=int, nargs=3, default=[24, 24, 24], help="voxels that are decided")
    parser.add_argument("--batch", type=int, default=64, help="patches that are classified at once")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    x, y, z = options.output
    network = patch_classifier(NetworkTask(1, 3, (x, y, z), (1.0, 1.0, 1.0))).eval()
    image = torch.randn(1, 1, *network.input_size((x, y, z)))
    dense(network, image)
    voxels = x * y * z
    fast, dense_seconds = timed(lambda: dense(network, image), options.repeats)
    slow, slid_seconds = timed(lambda: slid(network, image, options.batch), options.repeats)
    print(f"{torch.get_num_threads()} threads; {voxels:,} voxels, each decided by a field of {network.field}")
    print(f"slid   {voxels / slid_seconds:12,.0f} voxels/s")
    print(f"dense  {voxels / dense_seconds:12,.0f} voxels/s; logits differ by at most {(fast - slow).abs().max():.1e}")
    print(f"dense / slid: {slid_seconds / dense_seconds:,.0f}")


if __name__ == "__main__":
    main()
