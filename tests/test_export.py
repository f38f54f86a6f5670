"""`medseg export`: programs and ONNX files that answer as the model does, on sizes of any kind, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dicom_files import write_series
from network_variants import TASK, VARIANTS
from numpy.typing import NDArray
from phantom_experiments import preprocessed
from tiny_models import NEAREST_MEAN, NearestMean, make_model, make_plan, nearest_mean
from torch import Tensor

from pipeline.config import NetworkSection
from pipeline.data.phantoms import make_phantom
from pipeline.data.plan import Normalisation
from pipeline.errors import ModelError, PipelineError
from pipeline.model import load_model, save_model
from pipeline.networks import NETWORKS, build_network
from pipeline.networks.contract import NetworkTask
from pipeline.stages import export, train
from pipeline.stages.exporting.images import parity_images
from pipeline.stages.exporting.parity import Agreement, Parity, compare_windows
from pipeline.stages.exporting.program import LegalSizes, export_program
from pipeline.volumes.dicom.reading import read_series
from pipeline.volumes.dicom.series import find_series
from pipeline.volumes.writing import write_image

SMALL = NetworkSection(name="unet", options={"width": 4, "levels": 2, "norm": "none", "convs": 1})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    plan = make_plan(spacing_mm=(2.0, 2.0, 3.0), normalisation={"T1": Normalisation(scheme="zscore")})
    save_model(tmp_path / "model", make_model(plan=plan, network=SMALL))
    return tmp_path / "model"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (volume,) = make_phantom(11).images.values()
    write_image(tmp_path / "someone.nii.gz", volume)
    return tmp_path / "someone.nii.gz"


def test_a_program_runs_without_medseg_on_sizes_that_it_was_not_tried_on(
    model: Path, image: Path, tmp_path: Path
) -> None:
    report = export.run(str(model), "pt2", tmp_path / "out", images=[image])
    assert report.parity.holds
    assert report.parity.images == "windows of 1 image given"
    assert report.parity.sizes == ((16, 16, 8), (4, 4, 4), (10, 10, 10))
    assert report.parity.remarks[0] == "legal inputs: any batch, x 4 + 2n, y 4 + 2n, z 4 + 2n voxels"
    kept = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert kept["equal_labels"] == 1.0
    assert "someone" not in json.dumps(kept)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("network.pt2", "plan.yaml", "model.yaml", "MODEL_CARD.md", "parity.json"),
    }
    program = torch.export.load(tmp_path / "out" / "network.pt2").module()
    batch = torch.randn(3, 1, 12, 6, 22)
    with torch.inference_mode():
        assert torch.allclose(program(batch), make_model(network=SMALL).network(batch), atol=1e-5)


def test_an_image_may_be_a_folder_of_dicom(model: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "scan")
    loaded = load_model(model, torch.device("cpu"))
    found = parity_images(model, loaded.description, loaded.plan, [tmp_path / "scan"])
    (series,) = find_series(tmp_path / "scan")
    assert found.source == "1 image given"
    np.testing.assert_array_equal(found.cases[0]["T1"].array, read_series(series).array)


def test_what_is_there_is_not_replaced_unless_it_is_an_export_and_that_is_asked_for(
    model: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(PipelineError, match="is no earlier export"):
        export.run(str(model), "pt2", mine, overwrite=True)
    assert (mine / "thesis.txt").exists()
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "parity.json").write_text("{}")
    with pytest.raises(PipelineError, match="say --overwrite"):
        export.run(str(model), "pt2", earlier)


def test_an_unknown_format_and_a_model_that_does_not_segment_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="--format torchscript: unknown; use bundle, onnx, pt2"):
        export.run("anything", "torchscript", tmp_path / "out")
    with pytest.raises(ModelError, match="holds no model"):
        export.run(str(tmp_path / "none"), "pt2", tmp_path / "out")


def test_an_export_that_is_too_far_off_is_not_kept(
    model: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(folder: Path, job: export.Job) -> Parity:
        def run(batch: Tensor) -> NDArray[np.float32]:
            with torch.inference_mode():
                logits: NDArray[np.float32] = job.model.network(batch).numpy()
            return logits[:, ::-1]

        return job.window_parity("wrong", run, ("torch",))

    monkeypatch.setitem(export.FORMATS, "wrong", wrong)
    with pytest.raises(ModelError, match=r"differs from the model, and was not kept; parity on windows of 1 image"):
        export.run(str(model), "wrong", tmp_path / "out", images=[image])
    assert not (tmp_path / "out").exists()


def test_a_structure_that_is_lost_fails_however_small_it_is() -> None:
    ours, theirs = np.zeros((2, 100, 100, 100), np.uint8)
    ours[0, 0, :20] = 1
    labels = Agreement()
    labels.add(ours, theirs)
    fields = {"format": "pt2", "images": "one", "sizes": (), "versions": {}, "least_equal": 0.9999}
    logits = {"logit_difference": None, "logit_tolerance": None, "voxels": labels.voxels}
    report = Parity(**fields, **logits, equal_labels=labels.share, equal_in_structures=labels.share_in_structures)
    assert report.equal_labels > report.least_equal
    assert not report.holds
    assert "0.000% of those in structures" in report.as_text()
    assert Agreement(voxels=8, equal=8).share_in_structures is None


def test_differences_of_logits_and_labels_are_counted() -> None:
    network = NearestMean(0.0, 100.0, 200.0).eval()
    image = np.zeros((1, 4, 4, 2), np.float32)
    image[0, 0, 0, 0] = 100.0

    def run(batch: Tensor) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = network(batch).numpy().copy()
        logits[:, 1, 0, 0, 0] -= 6000.0  # of 100 * 100 - 100^2 / 2: less than the background's 0 now
        return logits

    found = compare_windows(network, run, [image], make_plan(patch_size=(4, 4, 2)), "softmax", [(4, 4, 2)])
    assert (found.logits, found.labels.equal, found.labels.voxels) == (6000.0, 31, 32)
    # The only voxel of a structure is the one that differs: 31 of 32 are right, and the structure is lost.
    assert (found.labels.structure_equal, found.labels.structure_voxels) == (0, 1)
    assert found.labels.share_in_structures == 0.0
    assert found.tolerance == pytest.approx(1e-3 * 20_000.0)


@pytest.mark.parametrize(
    ("name", "options", "window", "sizes"),
    [
        ("unet", SMALL.options, (16, 16, 8), (LegalSizes(4, 2), LegalSizes(4, 2), LegalSizes(4, 2))),
        # Two strides are the least along a free axis, and the window has but one along z.
        ("simple_fcn", {"width": 4}, (16, 16, 4), (LegalSizes(8, 4), LegalSizes(8, 4), LegalSizes(4, 0))),
        # A kernel of 3, twice: an output of two voxels at least wants six.
        (
            "patch_classifier",
            {"widths": [4], "pooling": False, "seen": 1, "hidden": [], "norm": "none"},
            (8, 8, 8),
            (LegalSizes(6, 1), LegalSizes(6, 1), LegalSizes(6, 1)),
        ),
    ],
)
def test_sizes_are_free_as_far_as_the_network_bears(
    name: str, options: dict[str, object], window: tuple[int, int, int], sizes: tuple[LegalSizes, ...]
) -> None:
    task = NetworkTask(1, 3, patch_size=window, spacing_mm=(1.0, 1.0, 1.0))
    network = build_network(name, options, task).eval()
    program = export_program(network, 1, window)
    assert program.sizes == sizes
    assert program.window == network.input_size(window)
    with torch.inference_mode():
        for size in program.some_sizes:
            batch = torch.randn(2, 1, *size)
            assert torch.allclose(program.exported.module()(batch), network(batch), atol=1e-5)


@pytest.mark.slow
def test_a_runs_model_is_compared_on_its_validation_cases(tmp_path: Path) -> None:
    settings = (
        "preprocessing.patch_size=[16, 16, 16]",
        "network.options={width: 4, levels: 2, norm: none, convs: 1}",
        "training.budget.steps=1",
    )
    (run,) = train.run(preprocessed(tmp_path, settings, cases=4, folds=2))
    report = export.run(str(run), "pt2", tmp_path / "out")
    assert report.parity.images == "windows of 2 validation cases of mine"
    assert report.parity.holds
    assert "learned from" in (tmp_path / "out" / "MODEL_CARD.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_network_can_be_exported(name: str) -> None:
    network = build_network(name, VARIANTS[name][0], TASK).eval()
    program = export_program(network, TASK.in_channels, TASK.patch_size)
    with torch.inference_mode():
        for size in program.some_sizes:
            batch = torch.randn(1, TASK.in_channels, *size)
            assert torch.allclose(program.exported.module()(batch), network(batch), atol=1e-5)


@pytest.mark.slow
def test_a_network_of_one_size_stays_at_it_and_says_so() -> None:
    task = NetworkTask(1, 3, patch_size=(16, 16, 16), spacing_mm=(1.0, 1.0, 1.0))
    network = build_network("unetr", {"width": 4, "hidden": 24, "mlp": 32, "heads": 2}, task).eval()
    program = export_program(network, 1, (16, 16, 16))
    assert program.sizes == (LegalSizes(16, 0),) * 3
    assert "takes no other" in program.remarks[0]
    with torch.inference_mode():
        batch = torch.randn(3, 1, 16, 16, 16)
        assert torch.allclose(program.exported.module()(batch), network(batch), atol=1e-5)


@pytest.mark.slow
def test_onnx_answers_as_the_model_on_windows_of_a_real_image(shared_data: Path, model: Path, tmp_path: Path) -> None:
    import onnxruntime

    from pipeline.stages.exporting.onnx_file import free_axes

    real = sorted((shared_data / "Task04_Hippocampus" / "imagesTr").glob("hippo*.nii.gz"))[0]
    report = export.run(str(model), "onnx", tmp_path / "out", images=[real])
    assert report.parity.logit_difference is not None
    assert report.parity.logit_difference < 1e-4
    assert report.parity.equal_labels >= 0.9999
    assert free_axes(tmp_path / "out" / "network.onnx") == [0, 2, 3, 4]
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "network.onnx"))
    batch = torch.randn(3, 1, 12, 6, 22)
    (logits,) = session.run(["logits"], {"image": batch.numpy()})
    with torch.inference_mode():
        assert np.allclose(logits, make_model(network=SMALL).network(batch).numpy(), atol=1e-4)


def test_without_an_image_it_says_that_phantoms_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, NEAREST_MEAN.name, nearest_mean)
    save_model(tmp_path / "model", make_model(network=NEAREST_MEAN))
    report = export.run(str(tmp_path / "model"), "pt2", tmp_path / "out")
    assert "2 phantoms, for no real image was at hand" in report.as_text()
