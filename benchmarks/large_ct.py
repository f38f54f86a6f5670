"""A whole large CT by `medseg segment`: seconds per step, windows run and skipped, peak memory, share of the network.

    python benchmarks/large_ct.py                                     # 512x512x800, 118 classes, a small network
    python benchmarks/large_ct.py --device cuda --width 32 --max-width 320 --levels 6 --patch 128   # as nnU-Net's
    python benchmarks/large_ct.py --slices 400 --classes 3 --width 16

The scan is a phantom of 0.8x0.8x1 mm, a body with organs in air; the network has random weights and a head that labels
by intensity (synthetic.py); the share of cells whose corners disagree is stated. Memory is the peak resident set of the
whole process; on a GPU also what torch had allocated there. The network's own share is that of as many bare forward
passes as windows were run, timed afterwards. `--options` are handed to `medseg segment`.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from side_by_side import MEDSEG, run_apart
from synthetic import ct_phantom, ct_plan, grid, save_untrained

from pipeline.hardware import autocast, keep_freed_memory, pick_device, pick_dtype
from pipeline.inference.windows.streaming import windows_at_once
from pipeline.networks import Network
from pipeline.volumes.volume import Volume, read_label
from pipeline.volumes.writing import write_image

NATIVE_MM = (0.8, 0.8, 1.0)
CASE = "ct"


def write_scan(path: Path, slices: int) -> None:
    path.parent.mkdir()
    geometry = grid((512, 512, slices), NATIVE_MM)
    write_image(path, Volume(ct_phantom(geometry.shape).astype(np.int16), geometry))


def bare_s(network: Network, patch: tuple[int, int, int], device: torch.device) -> float:
    """Return the seconds of a window's bare forward pass: the median of five batches of as many as medseg takes."""
    keep_freed_memory()
    dtype = pick_dtype("auto", device)
    batch = windows_at_once(network, patch, device, dtype)
    windows = torch.zeros(batch, 1, *network.input_size(patch), device=device)
    times = []
    with torch.inference_mode(), autocast(device, dtype):
        for _ in range(6):
            start = time.perf_counter()
            network.to(device)(windows).flatten()[0].item()  # waits for the GPU
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / batch


def ambiguous_share(label: Path) -> float:
    """Return the share of cells of the native grid whose corners are not of one label, in every tenth plane."""
    classes = read_label(label).array
    low = np.minimum(classes[::10, :, :-1], classes[::10, :, 1:])
    high = np.maximum(classes[::10, :, :-1], classes[::10, :, 1:])
    return float((np.minimum(low[:, :-1], low[:, 1:]) != np.maximum(high[:, :-1], high[:, 1:])).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=800)
    parser.add_argument("--classes", type=int, default=118)
    parser.add_argument("--spacing", type=float, default=1.5, help="of the plan's grid, mm")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--max-width", type=int, default=128)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--options", default="", help="further ones of `medseg segment`, in one string")
    options = parser.parse_args()
    plan = ct_plan(options.classes, (options.spacing,) * 3, options.patch)
    network_options = {"width": options.width, "max_width": options.max_width, "levels": options.levels}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_untrained(folder / "model", plan, network_options)
        write_scan(folder / "scans" / f"{CASE}.nii.gz", options.slices)
        command = [*MEDSEG, "segment", folder / "scans", "--model", folder / "model", "--out", folder / "out"]
        finished = run_apart([*command, "--device", options.device, *options.options.split()])
        (result,) = json.loads((folder / "out" / "report.json").read_text())["cases"]
        ambiguous = ambiguous_share(folder / "out" / result["output"])
    steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in result["seconds"].items())
    voxels_mb = math.prod((512, 512, options.slices)) / 2**20
    print(f"512x512x{options.slices}, {options.classes} classes, {options.device}: {result['status']}")
    print(f"seconds: {steps}; whole command {finished.seconds:.1f}; {ambiguous:.1%} of cells ambiguous")
    print(f"windows: {result['windows_run']} run, {result['windows_skipped']} skipped")
    print(f"peak resident {finished.peak_mb:.0f} MB; input {4 * voxels_mb:.0f} as float32, labels {voxels_mb:.0f}")
    device = pick_device(options.device)
    if device.type == "cuda":
        print(f"peak on the GPU {result['peak_memory_bytes'] / 2**20:.0f} MB")
    bare = result["windows_run"] * bare_s(model.network, plan.patch_size, device)
    share = bare / result["seconds"]["predict"]
    print(f"bare forward passes {bare:.1f} s: {share:.2f} of predict, {bare / finished.seconds:.2f} of the command")


if __name__ == "__main__":
    main()
