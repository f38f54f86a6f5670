"""nnU-Net's predictor over a folder of volumes, as its users run it; benchmarks/cases_per_hour.py calls it.

    .peers/nnunet/bin/python benchmarks/peers/predict_cases.py FOLDER nnunet_files|nnunet_sequential OUT

FOLDER holds images/*.nii.gz of one channel, the network (plain_unet.py), and plan.json: spacing_mm, patch_size and
labels of a plan that scales each case by its own mean and deviation. nnunet_files is predict_from_files with one
process each for preprocessing and export, what `nnUNetv2_predict -npp 1 -nps 1` does; nnunet_sequential is
predict_from_files_sequential, all in one process. No mirroring; resampling as nnU-Net's planner sets it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from plain_unet import largest_difference, load_plain_unet

CONFIGURATION = "3d_fullres"


def plans_of(plan: dict[str, Any]) -> dict[str, Any]:
    """Return nnU-Net's plans for a plan of medseg's; arrays are turned to (X, Y, Z), the order of the weights."""
    resample = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration: dict[str, Any] = {
        "data_identifier": "benchmark",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": plan["patch_size"],
        "spacing": plan["spacing_mm"],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": {},
    }
    for what, changed in (("data", {"order": 3}), ("seg", {"is_seg": True}), ("probabilities", {})):
        configuration[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{what}_kwargs"] = {**resample, **changed}
    return {
        "dataset_name": "benchmark",
        "plans_name": "benchmark",
        "transpose_forward": [2, 1, 0],
        "transpose_backward": [2, 1, 0],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},  # for CT only
        "configurations": {CONFIGURATION: configuration},
    }


def main() -> None:
    folder, road, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    network = load_plain_unet(folder)
    differs = largest_difference(network, folder)
    plan = json.loads((folder / "plan.json").read_text())
    plans = PlansManager(plans_of(plan))
    dataset = {"channel_names": {"0": "image"}, "labels": plan["labels"], "file_ending": ".nii.gz"}
    predictor = nnUNetPredictor(0.5, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(
        network, plans, plans.get_configuration(CONFIGURATION), [network.state_dict()], dataset, "nnUNetTrainer", None
    )
    images = sorted((folder / "images").iterdir())
    inputs = [[str(image)] for image in images]
    outputs = [str(out / image.name.removesuffix(".nii.gz")) for image in images]
    if road == "nnunet_files":
        predictor.predict_from_files(
            inputs, outputs, num_processes_preprocessing=1, num_processes_segmentation_export=1
        )
    else:
        predictor.predict_from_files_sequential(inputs, outputs)
    print(json.dumps({"logits_differ_by": differs}))


if __name__ == "__main__":
    main()
