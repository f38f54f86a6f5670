"""Peak memory of `medseg segment` on one large CT-like volume, and the sliding window's share over its bare forwards.

    python benchmarks/segment_memory.py                       # 512x512x400, 3 classes: some minutes on two cores
    python benchmarks/segment_memory.py --slices 100          # shorter; memory above the input must not differ
    python benchmarks/segment_memory.py --only windows

The memory is that of a process of its own (getrusage), before the batch and after it. The share is that of streaming
all windows of a volume over as many forward passes of one fixed batch, medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.config import InferenceSection, NetworkSection
from pipeline.data.plan import ChannelFingerprint, Fingerprint, Normalisation, Plan
from pipeline.geometry import Geometry
from pipeline.hardware import autocast, keep_freed_memory, pick_dtype
from pipeline.inference.tiling import Windowing
from pipeline.inference.windows import stream_logits
from pipeline.model import Model, ModelDescription, save_model
from pipeline.networks import Network, NetworkTask, build_network
from pipeline.volumes.volume import Volume
from pipeline.volumes.writing import write_image

PATCH = (96, 96, 96)
SPACING_MM = (1.5, 1.5, 1.5)
NETWORK = NetworkSection(name="unet", options={"width": 16, "max_width": 128, "levels": 5})
CPU = torch.device("cpu")


def make_network(classes: int) -> Network:
    torch.manual_seed(0)
    task = NetworkTask(in_channels=1, num_classes=classes, patch_size=PATCH, spacing_mm=SPACING_MM)
    return build_network(NETWORK.name, NETWORK.options, task).eval()


def make_model(classes: int) -> Model:
    labels = {"background": 0, **{f"organ_{index}": index for index in range(1, classes)}}
    plan = Plan(
        channels={"CT": "CT"},
        labels=labels,
        orientation="RAS",
        spacing_mm=SPACING_MM,
        crop="nonzero",
        patch_size=PATCH,
        batch_size=2,
        normalisation={"CT": Normalisation(scheme="ct", low=-200.0, high=300.0, mean=50.0, std=100.0)},
    )
    channel = ChannelFingerprint(mean=50.0, std=100.0, percentiles={}, case_medians=(-1e4, 1e4), zero_share=0.0)
    anything = {"0": (0.1, 0.1, 0.1), "100": (5e3, 5e3, 5e3)}
    fingerprint = Fingerprint(
        cases=1,
        spacing_mm=anything,
        shape=anything,
        extent_mm=anything,
        channels={"CT": channel},
        label_voxels={},
        label_cases={},
        label_volume_ml={},
    )
    description = ModelDescription(
        name="benchmark",
        network=NETWORK,
        in_channels=1,
        num_classes=classes,
        precision="auto",
        inference=InferenceSection(),
        manifest_name="none",
        manifest_digest="0" * 64,
        fold=None,
        step=0,
        scores={},
        versions={},
        created="",
    )
    return Model(description, make_network(classes), plan, fingerprint, "")


def write_ct(path: Path, slices: int) -> None:
    """Write a body of soft tissue with noise in air, 0.8x0.8x1.5 mm."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(-1, 1, 512), np.linspace(-1, 1, 512), indexing="ij")
    body = ((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1).astype(np.float32)
    image = np.full((1, 512, 512, slices), -1000, np.float32)
    for z in range(slices):
        image[0, :, :, z] += body * (1050 + 40 * rng.normal(size=body.shape) + 60 * np.sin(9 * x + z / 20))
    write_image(path, Volume(image.round(), Geometry((512, 512, slices), np.diag([0.8, 0.8, 1.5, 1.0]))))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def segment_in_this_process(folder: Path) -> None:
    """Segment the prepared volume and print what it took."""
    from pipeline.stages import segment

    before = peak_mb()
    report = segment.run(str(folder / "model"), [folder / "scans"], folder / "out", device="cpu", overwrite=True)
    (result,) = report.results
    after = peak_mb()
    print(f"peak before {before:.0f} MB, after {after:.0f} MB; status {result.status}; seconds {result.seconds}")


def measure_memory(slices: int, classes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Each in a process of its own: a child begins with its parent's peak.
        subprocess.run([sys.executable, __file__, "--write", str(folder), "--slices", str(slices)], check=True)
        save_model(folder / "model", make_model(classes))
        voxels_mb = 512 * 512 * slices / 2**20
        print(f"512x512x{slices}, {classes} classes: input {4 * voxels_mb:.0f} MB as float32, label {voxels_mb:.0f} MB")
        sys.stdout.flush()
        subprocess.run([sys.executable, __file__, "--segment", str(folder)], check=True)


def measure_share(classes: int, repeats: int) -> None:
    keep_freed_memory()
    network, dtype = make_network(classes), pick_dtype("auto", CPU)
    image = torch.randn(1, 144, 120, 110)
    stream = stream_logits([network], image, Windowing(PATCH), batch=1, dtype=dtype)
    batch = torch.randn(1, 1, *PATCH)

    def windows_s() -> float:
        start = time.perf_counter()
        for _ in stream:
            pass
        return time.perf_counter() - start

    @torch.inference_mode()
    def bare_s() -> float:
        start = time.perf_counter()
        for _ in range(stream.tiling.count):
            with autocast(CPU, dtype):
                network(batch)
        return time.perf_counter() - start

    windows_s(), bare_s()
    pairs = [(windows_s(), bare_s()) for _ in range(repeats)]
    share = statistics.median(a / b for a, b in pairs)
    whole, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        f"{stream.tiling.count} windows of {PATCH}, {classes} classes, {dtype}: streamed {whole:.2f} s, bare forwards "
        f"{bare:.2f} s, median ratio {share:.3f} (of {[round(a / b, 3) for a, b in pairs]})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=400)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["memory", "windows"])
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--segment", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_ct(arguments.write / "scans" / "ct.nii.gz", arguments.slices)
        return
    if arguments.segment:
        segment_in_this_process(arguments.segment)
        return
    if arguments.only != "windows":
        measure_memory(arguments.slices, arguments.classes)
    if arguments.only != "memory":
        measure_share(arguments.classes, arguments.repeats)


if __name__ == "__main__":
    main()
