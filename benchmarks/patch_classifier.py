"""The patch classifier slid over a volume, patch by patch in batches, beside its dense form in one pass.

Both decide the same voxels with the same weights, in interleaved pairs; the largest difference of their logits is
printed. Slid, the patches are views of the volume: only their copy into a batch counts.

Run: python benchmarks/patch_classifier.py [--output 16 16 16] [--batch 16] [--pairs 3]
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

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


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return what a run makes, and its seconds."""
    start = time.perf_counter()
    logits = run()
    return logits, time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=int, nargs=3, default=[16, 16, 16], help="voxels that are decided")
    parser.add_argument("--batch", type=int, default=16, help="patches that are classified at once")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    x, y, z = options.output
    network = patch_classifier(NetworkTask(1, 3, (x, y, z), (1.0, 1.0, 1.0))).eval()
    image = torch.randn(1, 1, *network.input_size((x, y, z)))
    runs = partial(dense, network, image), partial(slid, network, image, options.batch)
    runs[0]()
    fast, slow = [], []
    for _ in range(options.pairs):
        (at_once, dense_s), (one_by_one, slid_s) = map(timed, runs)
        fast.append(dense_s)
        slow.append(slid_s)
    ratios = sorted(slid_s / dense_s for slid_s, dense_s in zip(slow, fast, strict=True))
    voxels, difference = x * y * z, (at_once - one_by_one).abs().max()
    print(f"{torch.get_num_threads()} threads; {voxels:,} voxels, each decided by a field of {network.field}")
    print(f"slid   {voxels / statistics.median(slow):12,.0f} voxels/s")
    print(f"dense  {voxels / statistics.median(fast):12,.0f} voxels/s; logits differ by at most {difference:.1e}")
    print(f"dense / slid: median {statistics.median(ratios):,.0f}, from {ratios[0]:,.0f} to {ratios[-1]:,.0f}")


if __name__ == "__main__":
    main()
