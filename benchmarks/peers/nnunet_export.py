"""nnU-Net's export of one case, from logits to the label map on the native grid; benchmarks/labelling.py runs it.

    .peers/nnunet/bin/python benchmarks/peers/nnunet_export.py FOLDER THREADS

Reads FOLDER/logits.npy (K, X, Y, Z) float32 and FOLDER/grids.json (shape, spacing_mm and native_spacing_mm), writes
FOLDER/labels.npy, and prints as JSON the seconds of the one call, of the wall and of the CPU, and its peak memory
beyond the logits, in MB. The resampling and its options are those of nnU-Net's default planner; nothing is cropped or
transposed.
"""

import json
import re
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

# PyPI's torchvision does not match the CPU torch, and imports only where the operators it looks for are declared.
TORCHVISION = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def peak_mb() -> float:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def main() -> None:
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    logits, grids = torch.from_numpy(np.load(folder / "logits.npy")), json.loads((folder / "grids.json").read_text())
    shape = grids["shape"]
    plans = SimpleNamespace(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2])
    resample = partial(resample_data_or_seg_to_shape, is_seg=False, order=1, order_z=0, force_separate_z=None)
    configuration = SimpleNamespace(spacing=grids["spacing_mm"], resampling_fn_probabilities=resample)
    names = {"background": 0, **{f"class_{index}": index for index in range(1, len(logits))}}
    case = {
        "spacing": grids["native_spacing_mm"],
        "shape_after_cropping_and_before_resampling": shape,
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, length] for length in shape],
    }
    Path("/proc/self/clear_refs").write_text("5")
    before, start, cpu_start = peak_mb(), time.perf_counter(), time.process_time()
    labels = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, LabelManager(names, None), case, num_threads_torch=threads
    )
    seconds, cpu_s, peak = time.perf_counter() - start, time.process_time() - cpu_start, peak_mb() - before
    np.save(folder / "labels.npy", labels)
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "peak_mb": peak}))


if __name__ == "__main__":
    main()
