"""The MONAI bundle: its scripts do as medseg does, and MONAI without medseg verifies it and runs it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import NEAREST_MEAN, UNET, make_model, make_plan, nearest_mean

from pipeline.config import InferenceSection, NetworkSection
from pipeline.data.phantoms import make_phantom
from pipeline.data.plan import Normalisation, Plan
from pipeline.errors import ModelError
from pipeline.geometry import Geometry
from pipeline.inference.labelling import label_from_planes
from pipeline.inference.planes import LogitPlanes
from pipeline.inference.postprocessing import postprocess
from pipeline.inference.windows.tiling import Windowing
from pipeline.model import Model, save_model
from pipeline.networks import NETWORKS
from pipeline.predictor import Engine, Predictor
from pipeline.preparation.preprocessing import label_values, prepare_images
from pipeline.stages import export
from pipeline.stages.exporting.bundle_scripts.cases import find_cases
from pipeline.stages.exporting.bundle_scripts.grids import Grid
from pipeline.stages.exporting.bundle_scripts.labelling import NativeLabeld
from pipeline.stages.exporting.bundle_scripts.preparing import PlanGridd
from pipeline.stages.exporting.bundle_scripts.windows import PlannedWindows
from pipeline.volumes.volume import Volume, read_image, read_label
from pipeline.volumes.writing import write_image

CT = Normalisation(scheme="ct", low=-100.0, high=250.0, mean=60.0, std=40.0)


def oblique(order: list[int], signs: list[float], shape: tuple[int, int, int]) -> Geometry:
    """Return a rotated grid of 1.1 x 1.3 x 4.2 mm with permuted, flipped axes."""
    turn, lean = np.radians(11), np.radians(7)
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(lean), -np.sin(lean)], [0, np.sin(lean), np.cos(lean)]])
    affine = np.eye(4)
    affine[:3, :3] = (about_z @ about_x * [1.1, 1.3, 4.2] * signs)[:, order]
    affine[:3, 3] = (-30.0, 12.5, 71.0)
    return Geometry(shape, affine)


@pytest.mark.parametrize(
    ("order", "signs", "changes"),
    [
        ([0, 1, 2], [1, 1, 1], {}),
        ([2, 0, 1], [-1, 1, -1], {"orientation": "LPS", "spacing_mm": (2.0, 1.0, 3.0)}),
        # Twice as coarse along two axes: they are smoothed first. Across thick slices it is linear.
        ([1, 2, 0], [1, -1, 1], {"spacing_mm": (2.6, 2.6, 4.2), "thick_axis": 2}),
        ([0, 1, 2], [-1, -1, 1], {"crop": "nonzero", "spacing_mm": (1.5, 1.5, 2.0)}),
        ([0, 2, 1], [1, 1, 1], {"crop": "nonzero", "normalisation": {"T1": Normalisation(scheme="zscore_nonzero")}}),
        ([0, 1, 2], [1, 1, -1], {"normalisation": {"T1": CT}}),
        ([0, 1, 2], [1, 1, 1], {"normalisation": {"T1": Normalisation(scheme="none")}}),
    ],
)
def test_an_image_is_prepared_as_medseg_prepares_it(
    order: list[int], signs: list[float], changes: dict[str, object]
) -> None:
    plan = make_plan(**{"normalisation": {"T1": Normalisation(scheme="zscore")}, **changes})
    geometry = oblique(order, signs, (19, 23, 14))
    array = np.random.default_rng(3).normal(100, 60, (1, *geometry.shape)).astype(np.float32)
    array[:, :3] = array[:, :, -4:] = array[..., :2] = 0
    expected = prepare_images({"T1": Volume(array, geometry)}, plan, geometry)
    made, grid = preparation(plan).prepare(array, geometry.affine)
    assert grid.shape == expected.geometry.shape
    assert np.allclose(grid.affine, expected.geometry.affine, atol=1e-9)
    scale = np.abs(expected.array).max()
    assert np.abs(made - expected.array).max() < 1e-5 * scale


def preparation(plan: Plan) -> PlanGridd:
    return PlanGridd(
        plan.orientation,
        plan.spacing_mm,
        plan.crop == "nonzero",
        plan.thick_axis,
        [plan.normalisation[name].model_dump() for name in plan.channels],
    )


@pytest.mark.parametrize(
    ("network", "inference", "changes"),
    [
        (UNET, InferenceSection(overlap=0.5), {}),
        (UNET, InferenceSection(overlap=0.25, blending="constant", flip_axes=("x", "z")), {"orientation": "RAS"}),
        (
            NetworkSection(
                name="patch_classifier", options={"widths": [4], "pooling": False, "hidden": [], "norm": "none"}
            ),
            InferenceSection(flip_axes=("y",)),
            {"patch_size": (9, 9, 9)},
        ),
    ],
)
def test_windows_lie_and_weigh_as_medsegs_do(
    network: NetworkSection, inference: InferenceSection, changes: dict[str, object]
) -> None:
    model = make_model(plan=make_plan(**changes), network=network, inference=inference)
    predictor = Predictor(model.network, model.plan, inference, Engine("cpu", "fp32", skip_empty=False))
    image = np.random.default_rng(5).normal(size=(1, 37, 21, 11)).astype(np.float32)
    grid = Geometry(image.shape[1:], np.eye(4))
    with predictor.stream(image, predictor.memory_plan(grid, grid)) as stream:
        expected = torch.cat([planes.logits for planes in stream], dim=1)  # along x, the longest axis
    windowing, net = Windowing.of(model.plan, inference), model.network
    size = net.input_size(model.plan.patch_size)
    windows = PlannedWindows(
        net.output_size(size),
        size,
        net.margin,
        net.stride,
        inference.overlap,
        inference.blending == "gaussian",
        windowing.flips,
        windowing.left_right_axis,
        windowing.paired_classes,
        batch=3,
    )
    (logits,) = windows(torch.from_numpy(image)[None], net)
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("thick_axis", [None, 1])
def test_labels_on_the_native_grid_are_medsegs_to_the_voxel(regions: bool, thick_axis: int | None) -> None:
    plan = make_plan(spacing_mm=(2.0, 1.7, 2.5), crop="none")
    native = oblique([2, 0, 1], [-1, 1, 1], (15, 20, 18))
    grid = native.reoriented("RAS").cropped((1, 0, 2), (17, 15, 19)).respaced(plan.spacing_mm)
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(3 - regions, *grid.shape)).astype(np.float32)
    classes = label_from_planes(
        [LogitPlanes(0, torch.from_numpy(logits))],
        axis=0,
        prepared=grid,
        native=native,
        thick_axis=thick_axis,
        output="regions" if regions else "softmax",
    )
    rules = InferenceSection(largest_component=("left",), smallest_volume_ml={"right": 0.05})
    expected = label_values(postprocess(classes, plan, native, rules), plan)
    script = NativeLabeld([0, 1, 7], regions, thick_axis, [1], {"2": 0.05})
    made = script.label(logits, Grid(grid.shape, grid.affine), Grid(native.shape, native.affine))
    assert np.array_equal(made, expected)
    assert len(np.unique(made)) == 3


def test_files_become_cases(tmp_path: Path) -> None:
    for name in ("b_0001.nii.gz", "b_0000.nii.gz", "a.nii", "notes.txt"):
        (tmp_path / name).touch()
    assert find_cases(str(tmp_path), 2) == [
        {"image": str(tmp_path / "a.nii")},
        {"image": [str(tmp_path / "b_0000.nii.gz"), str(tmp_path / "b_0001.nii.gz")]},
    ]
    (tmp_path / "c_0000.nii.gz").touch()
    (tmp_path / "d_0002.nii.gz").touch()
    assert len(find_cases(str(tmp_path), 1)) == 5
    with pytest.raises(ValueError, match="expected cases of 3 channels"):
        find_cases(str(tmp_path), 3)


def test_channels_on_grids_of_their_own_are_refused(tmp_path: Path) -> None:
    names = {"T1": "MR", "T2": "MR"}
    plan = make_plan(channels=names, normalisation=dict.fromkeys(names, Normalisation(scheme="none")))
    section = NetworkSection(name="unet", options={"width": 4, "levels": 2, "norm": "none", "convs": 1})
    save_model(tmp_path / "model", make_model(plan=plan, network=section))
    phantom = make_phantom(3, channels=2)
    for number, image in enumerate(phantom.images.values()):
        write_image(tmp_path / "in" / f"p_000{number}.nii.gz", image)
    files = sorted((tmp_path / "in").iterdir())
    with pytest.raises(ModelError, match="channels lie on one grid"):
        export.run(str(tmp_path / "model"), "bundle", tmp_path / "out", images=files)


# What the bundle's specification says must be there; MONAI's own schema is on the internet, where no test goes.
SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "required": [
        *("schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version"),
        *("name", "task", "description", "authors", "copyright", "network_data_format"),
    ],
    "properties": {
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": {"additionalProperties": {"$ref": "#/definitions/tensor"}}},
        },
        "changelog": {"type": "object", "additionalProperties": {"type": "string"}},
        "version": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    },
    "definitions": {
        "tensor": {
            "type": "object",
            "required": [
                *("type", "format", "num_channels", "spatial_shape", "dtype", "value_range"),
                *("is_patch_data", "channel_def"),
            ],
            "properties": {"num_channels": {"type": "integer"}, "is_patch_data": {"type": "boolean"}},
        }
    },
}

VERIFY = """
import sys
sys.path.insert(0, ".")
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out
meta, config = "configs/metadata.json", "configs/inference.json"
verify_metadata(meta_file=meta, filepath=sys.argv[1])
verify_net_in_out("network_def", meta_file=meta, config_file=config, device="cpu")
workflow = ConfigWorkflow(config, meta, workflow_type="infer", logging_file=False, dataset_dir=sys.argv[2])
workflow.initialize()
print("missing properties:", workflow.check_properties())
"""


@pytest.mark.slow
def test_monai_verifies_and_runs_it_to_the_same_labels(
    peer_python: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, NEAREST_MEAN.name, nearest_mean)
    plan = make_plan(
        spacing_mm=(2.0, 1.5, 3.0), orientation="LPS", crop="nonzero", patch_size=(24, 24, 16), label_pairs=()
    )
    rules = InferenceSection(largest_component=("right",), flip_axes=("x",))
    save_model(tmp_path / "model", make_model(plan=plan, network=NEAREST_MEAN, inference=rules))
    for seed in (4, 5):
        (image,) = make_phantom(seed).images.values()
        scaled = (image.array * (200 / image.array.max())).astype(np.float32)
        write_image(tmp_path / "in" / f"case{seed}.nii.gz", Volume(scaled, image.geometry))
    report = export.run(str(tmp_path / "model"), "bundle", tmp_path / "out", images=[tmp_path / "in"])
    assert report.parity.equal_labels >= 0.999
    python = peer_python("nnunet")
    verify_in_monai(python, tmp_path / "out", tmp_path / "in")
    compare_in_monai(python, tmp_path / "model", tmp_path / "out", tmp_path / "in")


@pytest.mark.slow
def test_monai_labels_a_real_hippocampus_as_medseg_does(
    peer_python: Callable[[str], Path], shared_data: Path, tmp_path: Path
) -> None:
    python = peer_python("nnunet")
    plan = make_plan(
        patch_size=(32, 40, 24), normalisation={"T1": Normalisation(scheme="zscore")}, spacing_mm=(1.0, 1.0, 1.0)
    )
    save_model(tmp_path / "model", spread(make_model(plan=plan)))
    real = sorted((shared_data / "Task04_Hippocampus" / "imagesTr").glob("hippo*.nii.gz"))[:1]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "h.nii.gz").symlink_to(real[0])
    export.run(str(tmp_path / "model"), "bundle", tmp_path / "out", images=real)
    compare_in_monai(python, tmp_path / "model", tmp_path / "out", tmp_path / "in")


def spread(model: Model) -> Model:
    """Give a random network's classes biases by which each of them occurs."""
    with torch.no_grad():
        logits = model.network(torch.randn(2, 1, 32, 40, 24))
        for name, parameter in model.network.named_parameters():
            if name == "heads.0.bias":
                parameter -= logits.mean(dim=(0, 2, 3, 4))
    return model


def verify_in_monai(python: Path, bundle: Path, images: Path) -> None:
    """Have MONAI verify a bundle: its metadata, its network's input and output, what tools look for in its workflow."""
    schema = bundle.parent / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    said = in_monai(python, bundle, "-c", VERIFY, str(schema), str(images))
    assert "metadata is verified with no error" in said
    assert "data shape of network is verified with no error" in said
    assert "missing properties: []" in said


def compare_in_monai(python: Path, model: Path, bundle: Path, images: Path) -> None:
    """Have MONAI run a bundle, and compare its labels with medseg's."""
    labels = bundle.parent / "labels"
    files = ("--config_file", "configs/inference.json", "--meta_file", "configs/metadata.json")
    folders = ("--dataset_dir", str(images), "--output_dir", str(labels))
    in_monai(python, bundle, "-m", "monai.bundle", "run", *files, *folders)
    predictor = Predictor.load(model, Engine("cpu", "fp32"))
    for path in sorted(images.iterdir()):
        ours = predictor.predict(read_image(path))
        theirs = read_label(labels / path.name.replace(".nii.gz", "_seg.nii.gz"))
        assert theirs.geometry.matches(ours.geometry, 1e-3)
        assert np.mean(theirs.array == ours.array) >= 0.999
        assert len(np.unique(theirs.array)) > 1


def in_monai(python: Path, bundle: Path, *arguments: str) -> str:
    """Run MONAI's interpreter in a bundle's folder, and return what it said."""
    done = subprocess.run(
        [str(python), *arguments], cwd=bundle, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr
