"""Augmentation: milliseconds a batch of ours, nnU-Net's and MONAI's, in interleaved rounds on one thread each.

    python benchmarks/augmentation.py
        --peer-python .peers/nnunet/bin/python [--rounds 5] [--batches 10] [--batch-size 4]
    python benchmarks/augmentation.py --device cuda --peer-python .peers/nnunet/bin/python   # ours on the GPU

CPU time, which other processes on the machine change less than they do the wall's; with --device cuda ours is the
wall's, waiting for the device once a round. From patches in memory as they are read to patches as the network takes
them; drawing counts. "ours": medseg's defaults. "ours as nnunet": with nnU-Net's probabilities and ranges. The peers'
environment is that of peers/nnunet.txt, with the allocator's settings that medseg gives itself.
"""

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peer_training import ALLOCATOR

from pipeline.config import AugmentationSection
from pipeline.hardware import keep_freed_memory
from pipeline.training.sampling.augmentation import Augmentation

SIZES = ((40, 56, 40), (96, 96, 96))
PEER = Path(__file__).parent / "peers" / "augment.py"

# nnU-Net 2.8.1, nnUNetTrainer.get_training_transforms: rotation and scaling are drawn apart, each with 0.2; blur and
# coarsening are drawn per image, then with 0.5 per channel; of two gammas, 0.1 and 0.3, the second is ours.
AS_NNUNET = AugmentationSection(
    flip_axes=("x", "y", "z"),
    affine_probability=0.36,
    rotation_degrees=30,
    scale=(0.7, 1.4),
    scale_anisotropy=0.0,
    shift_voxels=0.0,
    elastic_probability=0.0,
    noise_probability=0.1,
    noise_std=(0.0, 0.32),
    blur_probability=0.1,
    low_resolution_probability=0.125,
    gamma_probability=0.4,
)


def ours(section: AugmentationSection, size: tuple[int, int, int], batch: int, device: torch.device) -> Callable:
    augmentation = Augmentation(
        section,
        patch_size=size,
        target_size=size,
        left_right_axis=0,
        paired_classes=(),
        num_classes=3,
        spacing_mm=(1.0, 1.0, 1.0),
        seed=0,
    )
    x, y, z = (n // 4 for n in augmentation.read_size)
    label = torch.zeros(batch, *augmentation.read_size, dtype=torch.uint8)
    label[:, x : 2 * x, y : 3 * y, z : 3 * z], label[:, 2 * x : 3 * x, y : 3 * y, z : 3 * z] = 1, 2
    image, label = torch.randn(batch, 1, *augmentation.read_size).half().to(device), label.to(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    done = 0

    def seconds(batches: int) -> float:
        nonlocal done
        start = clock()
        for _ in range(batches):
            augmentation(image.float(), label, augmentation.draw(range(done, done + batch)))
            done += batch
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    seconds(1)
    return seconds


def peer(python: Path, name: str, size: tuple[int, int, int], batch: int) -> Callable:
    command = [str(part) for part in (python, PEER, name, *size, batch)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, **ALLOCATOR}, **pipes)
    while (line := process.stdout.readline()) != "ready\n":
        if not line:
            raise SystemExit(f"{' '.join(command)}: exit code {process.wait()}")

    def seconds(batches: int) -> float:
        print(batches, file=process.stdin, flush=True)
        return float(process.stdout.readline())

    return seconds


def compare(size: tuple[int, int, int], options: argparse.Namespace) -> None:
    """Print a line a party, and the ratios to the first round by round."""
    batch, device = options.batch_size, torch.device(options.device)
    parties = {"ours": ours(AugmentationSection(), size, batch, device)}
    parties["ours as nnunet"] = ours(AS_NNUNET, size, batch, device)
    if options.peer_python:
        parties |= {name: peer(options.peer_python, name, size, batch) for name in ("nnunet", "monai")}
    rounds = [{name: run(options.batches) for name, run in parties.items()} for _ in range(options.rounds)]
    print(f"{batch} patches of {'x'.join(map(str, size))}, ours on {device}, {torch.__version__}")
    for name in parties:
        ms = [1000 * found[name] / options.batches for found in rounds]
        print(f"  {name:15} {statistics.median(ms):8.2f} ms a batch, from {min(ms):.2f} to {max(ms):.2f}")
    for own, other in (("ours", "nnunet"), ("ours as nnunet", "nnunet"), ("ours", "monai")):
        if other in parties:
            ratios = sorted(found[other] / found[own] for found in rounds)
            print(f"  {other} / {own}: {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    for size in SIZES:
        compare(size, options)


if __name__ == "__main__":
    main()
