"""The window engine: over its own bare forward passes, beside nnU-Net's and MONAI's sliding windows, and in bf16.

    python benchmarks/engine.py bare                                   # wanted: 1.05 in float32, 1.10 in bf16
    python benchmarks/engine.py peers
        --peer-python .peers/nnunet/bin/python   # wanted: 0.35 of the time, 0.5 of the memory
    python benchmarks/engine.py precision --model MODEL IMAGE...       # wanted: 99.9 % of the labels as in float32

The network is a U-Net of 16-32-64-128-128 maps with InstanceNorm, windows of 96^3 overlap by half, blended by a
Gaussian; --shape, --classes and --window make it smaller. bare: streaming all windows over forward passes of one fixed
batch, as large as medseg takes it and as many windows in all, the same network, precision and allocator, medians of
interleaved pairs. peers: the same weights and image (peers/nnunet.txt makes their environment), each party in a
process of its own, in turns; seconds are those of the one call after a first forward pass, ours with the labels taken
from the planes; memory is the peak resident set of the whole process, libraries, image and result included. Both peers
return all K logit volumes.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from side_by_side import PEERS, Finished, export_unet, run_apart
from synthetic import ct_plan
from torch import Tensor

from pipeline.config import InferenceSection, NetworkSection
from pipeline.geometry import Geometry
from pipeline.hardware import Precision, autocast, keep_freed_memory
from pipeline.inference.memory import MemoryPlan
from pipeline.networks import Network
from pipeline.networks.fitting import network_for
from pipeline.predictor import Engine, Predictor
from pipeline.volumes.volume import read_image

OPTIONS = {"width": 16, "max_width": 128, "levels": 5}
SPACING_MM = (1.5, 1.5, 1.5)
OURS: tuple[Precision, ...] = ("fp32", "auto")


def make_network(classes: int, window: int) -> Network:
    torch.manual_seed(0)
    return network_for(ct_plan(classes, SPACING_MM, window), NetworkSection(name="unet", options=OPTIONS)).eval()


def make_predictor(network: Network, options: argparse.Namespace, precision: Precision) -> Predictor:
    plan = ct_plan(options.classes, SPACING_MM, options.window)
    return Predictor(network, plan, InferenceSection(), Engine(device="cpu", precision=precision))


def make_image(shape: tuple[int, int, int]) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)


def memory_of(predictor: Predictor, image: NDArray[np.float32]) -> MemoryPlan:
    grid = Geometry(image.shape[1:], np.eye(4))
    return predictor.memory_plan(grid, grid)


def streamed_s(predictor: Predictor, image: NDArray[np.float32]) -> tuple[float, int]:
    """Return the seconds of streaming all windows, and their number."""
    memory, start = memory_of(predictor, image), time.perf_counter()
    with predictor.stream(image, memory) as stream:
        for _ in stream:
            pass
    return time.perf_counter() - start, stream.tiling.count


@torch.inference_mode()
def bare_s(network: Network, batch: Tensor, windows: int, dtype: torch.dtype) -> float:
    """Return the seconds of as many windows by forward passes of one fixed batch."""
    start, passes = time.perf_counter(), -(-windows // len(batch))
    for _ in range(passes):
        with autocast(batch.device, dtype):
            network(batch)
    return (time.perf_counter() - start) * windows / (passes * len(batch))


def bare(options: argparse.Namespace) -> None:
    """Print streaming over bare forward passes, in both precisions."""
    keep_freed_memory()
    network, image = make_network(options.classes, options.window), make_image(options.shape)
    for precision, wanted in (("fp32", 1.05), ("bf16", 1.10)):
        predictor = make_predictor(network, options, precision)
        batch = torch.randn(predictor.batch, 1, *(options.window,) * 3)
        _, windows = streamed_s(predictor, image)
        pairs = [
            (streamed_s(predictor, image)[0], bare_s(network, batch, windows, predictor.dtype))
            for _ in range(options.rounds)
        ]
        ratios = sorted(streamed / plain for streamed, plain in pairs)
        streamed, plain = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"{windows} windows, {options.classes} classes, {precision}: {streamed:.2f} s, bare {plain:.2f} s")
        print(f"ours / bare, {precision}: {_spread(ratios)}; wanted: {wanted}", flush=True)


def ours(options: argparse.Namespace) -> None:
    """Stream once, in this process, and write the labels."""
    keep_freed_memory()
    network, image = make_network(options.classes, options.window), np.load(options.folder / "image.npy")
    predictor = make_predictor(network, options, options.precision)
    streamed_s(predictor, image[:, : options.window, : options.window, : options.window])
    memory, start = memory_of(predictor, image), time.perf_counter()
    with predictor.stream(image, memory) as stream:
        labels = np.empty(np.moveaxis(image[0], stream.axis, 0).shape, np.uint8)
        for planes in stream:
            labels[planes.start : planes.start + planes.logits.shape[1]] = planes.logits.argmax(0)
    taken = time.perf_counter() - start
    np.save(options.folder / f"{options.precision}.npy", np.moveaxis(labels, 0, stream.axis))
    print(json.dumps({"seconds": taken, "dtype": str(predictor.dtype)}))


def peers(options: argparse.Namespace) -> None:
    """Print our time and peak memory beside those of both peers."""
    sizes = [str(n) for n in (options.window,) * 3]
    own = ["--shape", *map(str, options.shape), "--classes", str(options.classes), "--window", str(options.window)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "image.npy", make_image(options.shape))
        export_unet(make_network(options.classes, options.window), folder)
        engine = [sys.executable, __file__, "ours", *own, "--folder", folder, "--precision"]
        parties = {f"ours {precision}": [*engine, precision] for precision in OURS}
        script = PEERS / "sliding_window.py"
        parties |= {peer: [options.peer_python, script, folder, peer, *sizes] for peer in ("nnunet", "monai")}
        results: dict[str, list[Finished]] = {party: [] for party in parties}
        for _ in range(options.rounds):
            for party, command in parties.items():
                results[party].append(run_apart(command))
        labels = {party: np.load(folder / f"{party.removeprefix('ours ')}.npy") for party in parties}
    _print_parties(results, labels)


def _print_parties(results: dict[str, list[Finished]], labels: dict[str, NDArray[np.uint8]]) -> None:
    """Print a line a party, and the ratios to the faster peer round by round."""
    times = {party: [run.answer["seconds"] for run in runs] for party, runs in results.items()}
    peaks = {party: statistics.median(run.peak_mb for run in runs) for party, runs in results.items()}
    for party, runs in results.items():
        alike = (labels[party] == labels["ours fp32"]).mean()
        note = runs[0].answer.get("dtype") or f"logits differ by {runs[0].answer['logits_differ_by']:.0e} on a probe"
        print(
            f"{party:13} {statistics.median(times[party]):8.2f} s {peaks[party]:7.0f} MB   {note}; "
            f"{alike:.2%} of labels as ours in fp32"
        )
    faster = min(("nnunet", "monai"), key=lambda peer: statistics.median(times[peer]))
    for party in ("ours fp32", "ours auto"):
        ratios = sorted(a / b for a, b in zip(times[party], times[faster], strict=True))
        memory = peaks[party] / peaks[faster]
        wanted = "; wanted: 0.35, 0.5" if party == "ours auto" else ""
        print(f"{party} / {faster}: time {_spread(ratios)}, memory {memory:.2f}{wanted}")


def precision(options: argparse.Namespace) -> None:
    """Print the share of voxels that bf16 labels as float32 does."""
    float32, bf16 = (Predictor.load(options.model, Engine("cpu", name)) for name in ("fp32", "bf16"))
    keep_freed_memory()
    alike = voxels = 0
    for path in options.images:
        image = read_image(path)
        alike += int((float32.predict(image).array == bf16.predict(image).array).sum())
        voxels += math.prod(image.array.shape[1:])
    print(f"{len(options.images)} volumes: {alike / voxels:.4%} of {voxels:,} voxels alike in bf16; wanted: 99.9 %")


def _spread(ratios: list[float]) -> str:
    """Say the median of sorted ratios, and their range."""
    return f"median {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}, {len(ratios)} rounds)"


def main() -> None:
    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument("--shape", type=int, nargs=3, default=[244, 202, 224])
    sizes.add_argument("--classes", type=int, default=20)
    sizes.add_argument("--window", type=int, default=96)
    sizes.add_argument("--rounds", type=int, default=3)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="bare|peers|precision")
    commands.add_parser("bare", parents=[sizes]).set_defaults(run=bare)
    beside = commands.add_parser("peers", parents=[sizes])
    beside.add_argument("--peer-python", type=Path, required=True)
    beside.set_defaults(run=peers)
    alike = commands.add_parser("precision")
    alike.add_argument("--model", type=Path, required=True)
    alike.add_argument("images", type=Path, nargs="+")
    alike.set_defaults(run=precision)
    apart = commands.add_parser("ours", parents=[sizes])  # what `peers` runs as our party
    apart.add_argument("--folder", type=Path)
    apart.add_argument("--precision", choices=OURS)
    apart.set_defaults(run=ours)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
