"""nnU-Net's preprocessing of one case, from files to arrays; benchmarks/ct_preprocessing.py runs it.

    .peers/nnunet/bin/python benchmarks/peers/nnunet_preprocessing.py FOLDER

Reads FOLDER/image.nii, FOLDER/label.nii and FOLDER/plan.json (spacing_mm, low, high, mean, std, labels), writes
FOLDER/nnunet.npy (X, Y, Z), and prints as JSON the seconds of the one call, of the wall and of the CPU, and its peak
memory beyond the libraries, in MB. The resampling and its options are those of nnU-Net's default planner.
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

# PyPI's torchvision does not match the CPU torch, and imports only where the operators it looks for are declared.
TORCHVISION = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def peak_mb() -> float:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def plans_of(plan: dict) -> dict:
    image = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    label = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
    function = "resample_data_or_seg_to_shape"
    configuration = {
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [96, 96, 96],
        "spacing": [plan["spacing_mm"]] * 3,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": function,
        "resampling_fn_data_kwargs": image,
        "resampling_fn_seg": function,
        "resampling_fn_seg_kwargs": label,
        "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    intensities = {
        "mean": plan["mean"],
        "std": plan["std"],
        "percentile_00_5": plan["low"],
        "percentile_99_5": plan["high"],
    }
    return {
        "dataset_name": "Dataset001_ct",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
    }


def main() -> None:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder = Path(sys.argv[1])
    plan = json.loads((folder / "plan.json").read_text())
    plans = PlansManager(plans_of(plan))
    configuration = plans.get_configuration("3d_fullres")
    dataset = {"channel_names": {"0": "CT"}, "labels": plan["labels"], "file_ending": ".nii"}
    files = [str(folder / "image.nii")], str(folder / "label.nii")
    preprocessor = DefaultPreprocessor(verbose=False)
    _ = plans.image_reader_writer_class  # its libraries are imported here: they are no part of the call
    Path("/proc/self/clear_refs").write_text("5")
    before, start, cpu_start = peak_mb(), time.perf_counter(), time.process_time()
    image, _, _ = preprocessor.run_case(*files, plans, configuration, dataset)
    seconds, cpu_s, peak = time.perf_counter() - start, time.process_time() - cpu_start, peak_mb() - before
    np.save(folder / "nnunet.npy", image[0].T)  # (Z, Y, X) as SimpleITK has it -> (X, Y, Z)
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "peak_mb": peak}))


if __name__ == "__main__":
    main()
