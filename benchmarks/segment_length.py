"""Peak memory of a segmentation against the length of the scan: all but the input and the results must stay the same.

    python benchmarks/segment_length.py [--slices 300 400 800 1600] [--classes 25]   # wanted: flat within 10 %

Volumes of 256x256 voxels of 1.5 mm, a plan's grid of 2 mm, windows of 96^3, a small network of random weights; the
volume is in memory, each length in a process of its own, through `Predictor.predict`. Counted: the peak resident set
during the call, less the process as it was before it (libraries, weights, the input), less the image on the plan's grid
(float32) and the label map. Needs Linux.
"""

import argparse
import json
import math
import sys
import time

import torch
from side_by_side import memory_mb, run_apart
from synthetic import ct_phantom, ct_plan, grid, untrained_model

from pipeline.hardware import keep_freed_memory, peak_memory_bytes, reset_peak_memory
from pipeline.predictor import Engine, Predictor
from pipeline.volumes.volume import Volume

NATIVE_MM, PLAN_MM = (1.5, 1.5, 1.5), (2.0, 2.0, 2.0)
CPU = torch.device("cpu")


def measure(slices: int, classes: int) -> None:
    """Segment one volume in this process, and print what it took as JSON."""
    native = grid((256, 256, slices), NATIVE_MM)
    image = Volume(ct_phantom(native.shape), native)
    model = untrained_model(ct_plan(classes, PLAN_MM), {"width": 4, "max_width": 32})
    predictor = Predictor(model.network, model.plan, model.description.inference, Engine(device="cpu"))
    keep_freed_memory()
    before = memory_mb("VmRSS")
    reset_peak_memory(CPU)
    start = time.perf_counter()
    label = predictor.predict(image)
    seconds, peak = time.perf_counter() - start, (peak_memory_bytes(CPU) or 0) / 2**20
    arrays = (4 * math.prod(native.respaced(PLAN_MM).shape) + label.array.nbytes) / 2**20
    print(json.dumps({"before": before, "peak": peak, "arrays": arrays, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, nargs="+", default=[300, 400, 800, 1600])
    parser.add_argument("--classes", type=int, default=25)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.slices[0], options.classes)
        return
    rest = []
    for slices in options.slices:
        command = (sys.executable, __file__, "--measure", "--slices", slices, "--classes", options.classes)
        found = run_apart(command).answer
        rest.append(found["peak"] - found["before"] - found["arrays"])
        print(
            f"256x256x{slices}, {options.classes} classes: peak {found['peak']:.0f} MB, {found['before']:.0f} before, "
            f"plan's grid and labels {found['arrays']:.0f}, the rest {rest[-1]:.0f} MB; {found['seconds']:.1f} s",
            flush=True,
        )
    middle = (max(rest) + min(rest)) / 2
    print(f"the rest: {min(rest):.0f} to {max(rest):.0f} MB, +- {max(rest) / middle - 1:.1%}; wanted: 10 %")


if __name__ == "__main__":
    main()
