"""A MONAI bundle: the network as an exported program, MONAI's configuration around it, scripts for what MONAI lacks.

BUNDLE/configs/metadata.json    what MONAI and its tools read first
       configs/inference.json   `python -m monai.bundle run --config_file configs/inference.json`
       models/network.pt2       the network's program
       models/model.pt          its weights, a state dict of tensors alone
       scripts/                 preparation, windows, labelling
       docs/README.md           how to run it, and the model's card
       LICENSE
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.plan import Plan
from pipeline.errors import ModelError
from pipeline.inference.windows.tiling import Windowing
from pipeline.model import Model
from pipeline.predictor import Predictor
from pipeline.records import write_json, write_text
from pipeline.stages.exporting import bundle_scripts
from pipeline.stages.exporting.bundle_scripts.grids import Grid
from pipeline.stages.exporting.bundle_scripts.labelling import NativeLabeld
from pipeline.stages.exporting.bundle_scripts.network import ExportedNetwork
from pipeline.stages.exporting.bundle_scripts.preparing import PlanGridd
from pipeline.stages.exporting.bundle_scripts.windows import PlannedWindows
from pipeline.stages.exporting.images import ParityImages
from pipeline.stages.exporting.parity import Agreement, Parity
from pipeline.stages.exporting.program import Program
from pipeline.stages.model_card import DataFacts

PROGRAM, STATE = "models/network.pt2", "models/model.pt"
METADATA, INFERENCE = "configs/metadata.json", "configs/inference.json"

# Where MONAI publishes the schema of metadata.json; `verify_metadata` takes a copy beside it for want of internet.
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"

# Label maps of the bundle and of medseg: sums of another order may decide a voxel between two logits that are equal.
LEAST_EQUAL = 0.999

# Windows that a bundle runs at a time.
WINDOWS_AT_ONCE = 4


def write_bundle(
    folder: Path, model: Model, program: Program, predictor: Predictor, card: str, facts: DataFacts | None
) -> None:
    """Write a model as a MONAI bundle.

    Args:
        folder: to write into; empty.
        model: the model.
        program: its network, exported.
        predictor: of the model, with the rules that were chosen for it.
        card: the model's card.
        facts: of its data; None where they are not known.
    """
    for name in ("models", "configs", "docs"):
        (folder / name).mkdir()
    torch.export.save(program.exported, folder / PROGRAM)
    torch.save(
        {name: tensor.clone() for name, tensor in program.exported.module().state_dict().items()}, folder / STATE
    )
    parts = _Parts(model, program, predictor)
    write_json(folder / INFERENCE, _inference(model.plan, parts))
    write_json(folder / METADATA, _metadata(model, program, facts))
    source = Path(bundle_scripts.__file__).parent
    shutil.copytree(source, folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    write_text(folder / "docs" / "README.md", _readme(model, card))
    write_text(folder / "LICENSE", _licence(facts))


def bundle_parity(folder: Path, model: Model, program: Program, predictor: Predictor, images: ParityImages) -> Parity:
    """Segment images by the bundle's program and scripts, and by medseg, and compare the label maps.

    Raises:
        ModelError: no image has all of its channels on one grid, as a bundle wants them.
    """
    parts, labels = _Parts(model, program, predictor), Agreement()
    background = model.plan.class_values[0]
    network = ExportedNetwork(str(folder / PROGRAM), str(folder / STATE))
    for channels in images.cases:
        native = predictor.native_of(channels)
        if len(channels) < len(model.plan.channels) or any(one.geometry != native for one in channels.values()):
            continue
        ours = predictor.values_of(predictor.segment(predictor.prepare(channels, native), native).classes)
        stacked = np.concatenate([channels[name].array for name in model.plan.channels])
        labels.add(ours, _segment(parts, network, stacked, native.affine), background)
    if not labels.voxels:
        raise ModelError(
            "a bundle takes images whose channels lie on one grid, and none here has them so; give one by --image"
        )
    return Parity(
        format="bundle",
        images=images.source,
        sizes=(program.window,),
        voxels=labels.voxels,
        logit_difference=None,
        logit_tolerance=None,
        equal_labels=labels.share,
        least_equal=LEAST_EQUAL,
        equal_in_structures=labels.share_in_structures,
        versions={"torch": torch.__version__, "monai": version("monai")},
        remarks=("compared with `medseg segment --precision fp32 --no-skip`; the bundle computes in float32",),
    )


class _Parts:
    """What a bundle's configuration makes of its scripts: the arguments of each."""

    def __init__(self, model: Model, program: Program, predictor: Predictor) -> None:
        plan, network, inference = model.plan, model.network, predictor.inference
        windowing = Windowing.of(plan, inference, predictor.output)
        classes = {name: index for index, name in enumerate(plan.labels)}
        self.preparation: dict[str, Any] = {
            "orientation": plan.orientation,
            "spacing_mm": list(plan.spacing_mm),
            "crop_to_nonzero": plan.crop == "nonzero",
            "thick_axis": plan.thick_axis,
            "normalisation": [plan.normalisation[c].model_dump(mode="json", exclude_none=True) for c in plan.channels],
        }
        self.windows: dict[str, Any] = {
            "window": list(network.output_size(program.window)),
            "input_size": list(program.window),
            "margin": list(network.margin),
            "stride": list(network.stride),
            "overlap": windowing.overlap,
            "gaussian": windowing.blending == "gaussian",
            "flips": [list(flip) for flip in windowing.flips],
            "left_right_axis": windowing.left_right_axis,
            "swapped": [list(pair) for pair in windowing.paired_classes],
            "batch": WINDOWS_AT_ONCE,
        }
        self.labelling: dict[str, Any] = {
            "values": list(plan.class_values),
            "regions": predictor.output == "regions",
            "thick_axis": plan.thick_axis,
            "largest_component": [classes[name] for name in inference.largest_component],
            "smallest_volume_ml": {str(classes[name]): ml for name, ml in inference.smallest_volume_ml.items()},
        }


def _segment(parts: _Parts, network: ExportedNetwork, image: NDArray[Any], affine: NDArray[Any]) -> NDArray[Any]:
    """Segment (C, X, Y, Z) as the bundle does, files and MONAI's own parts aside."""
    prepared, grid = PlanGridd(**parts.preparation).prepare(image, affine)
    (logits,) = PlannedWindows(**parts.windows)(torch.from_numpy(prepared)[None], network)
    return NativeLabeld(**parts.labelling).label(logits.numpy(), grid, Grid(image.shape[1:], affine))


def _inference(plan: Plan, parts: _Parts) -> dict[str, Any]:
    """Return the configuration that MONAI runs."""
    load = {"_target_": "LoadImaged", "keys": "image", "image_only": True, "ensure_channel_first": True}
    save = {
        "_target_": "SaveImaged",
        "keys": "pred",
        "output_dir": "@output_dir",
        "output_postfix": "seg",
        "output_dtype": _label_type(plan),
        "resample": False,
        "separate_folder": False,
    }
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": {
            "_target_": "scripts.cases.find_cases",
            "dataset_dir": "@dataset_dir",
            "channels": len(plan.channels),
        },
        "network_def": {
            "_target_": "scripts.network.ExportedNetwork",
            "program": f"$@bundle_root + '/{PROGRAM}'",
            "weights": f"$@bundle_root + '/{STATE}'",
            "device": "@device",
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [load, {"_target_": "scripts.preparing.PlanGridd", **parts.preparation}],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "shuffle": False},
        "inferer": {"_target_": "scripts.windows.PlannedWindows", **parts.windows},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "scripts.labelling.NativeLabeld", **parts.labelling}, save],
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }


def _label_type(plan: Plan) -> str:
    """Return the type of a label file's voxels."""
    low, high = min(plan.class_values), max(plan.class_values)
    return next(
        kind for kind in ("uint8", "int16", "int32") if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max
    )


def _metadata(model: Model, program: Program, facts: DataFacts | None) -> dict[str, Any]:
    """Return what MONAI's schema asks for."""
    description, plan = model.description, model.plan
    modalities = ", ".join(dict.fromkeys(plan.channels.values()))
    outputs = list(plan.regions) if description.output == "regions" else list(plan.labels)
    structures = ", ".join(plan.structures)
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported from medseg model {description.name}, fold {description.fold}"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {
            "nibabel": version("nibabel"),
            "scipy": version("scipy"),
            "pytorch-ignite": "0.4.11",
        },
        "name": description.name,
        "task": f"Segmentation of {structures}",
        "description": f"{description.network.name}, trained by medseg on {description.manifest_name}: {structures} in "
        f"{modalities}. docs/README.md is its model card.",
        "authors": "trained by its owner with medseg",
        "copyright": "see LICENSE",
        "data_source": (facts.source if facts else "") or description.manifest_name,
        "data_type": "nibabel",
        "image_classes": ", ".join(f"{name} ({modality})" for name, modality in plan.channels.items()),
        "label_classes": ", ".join(f"{value} is {name}" for name, value in plan.labels.items()),
        "pred_classes": f"logits of {', '.join(outputs)}",
        "eval_metrics": dict(description.scores),
        "intended_use": "Research only: not a medical device, not for decisions about patients",
        "references": [],
        # For a training that begins with it: whether it has seen the cases held out there.
        "medseg": {"manifest": description.manifest_name, "fold": description.fold},
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield" if modalities == "CT" else "magnitude",
                    "modality": modalities,
                    "num_channels": len(plan.channels),
                    "spatial_shape": list(program.window),
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {str(index): name for index, name in enumerate(plan.channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "classes" if description.output == "regions" else "labels",
                    "num_channels": len(outputs),
                    "spatial_shape": list(model.network.output_size(program.window)),
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {str(index): name for index, name in enumerate(outputs)},
                }
            },
        },
    }


def _readme(model: Model, card: str) -> str:
    """Return how the bundle is run, and the card."""
    plan = model.plan
    files = (
        "a folder of NIfTI files, one a case"
        if len(plan.channels) == 1
        else f"a folder of CASE_0000.nii.gz ... for {', '.join(plan.channels)}, all on one grid, or one 4-D file a case"
    )
    return f"""# {model.description.name} as a MONAI bundle

In this folder, where MONAI, pytorch-ignite, nibabel, scipy and fire are installed (medseg need not be):

    python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json \\
        --dataset_dir IMAGES --output_dir LABELS

IMAGES is {files}. A label map CASE_seg.nii.gz is written for each, on the image's own grid.

`models/network.pt2` is the network as a program (`torch.export`), which needs no code of its own; `models/model.pt` are
its weights, a state dict of tensors, and the ones that are used. `scripts/` prepares the image, runs the windows and
labels the native grid as medseg does; loading, saving and the engine are MONAI's.

{card}"""


def _licence(facts: DataFacts | None) -> str:
    """Return what is known of what may be done with the bundle."""
    data = (facts.licence if facts else "") or "not recorded; ask whoever made it"
    return (
        "The files under scripts/ are medseg's, under the Apache License, Version 2.0 "
        "(http://www.apache.org/licenses/LICENSE-2.0).\n\n"
        "The weights under models/ belong to whoever trained them, who has said no more here. The data set that they "
        f"were learned from has the licence: {data}\n"
    )
