"""Each stage that uses a GPU, on one: `pytest -m gpu`; skipped where there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import AugmentationSection, Config
from pipeline.config_loading import load_config, packaged
from pipeline.data.phantoms import make_phantom, write_phantom_dataset
from pipeline.stages import evaluate, manifest, preprocess, segment, train
from pipeline.training.sampling.augmentation import Augmentation
from pipeline.training.sampling.batches import Batches
from pipeline.training.sampling.cases import HeldCase, Place
from pipeline.training.sampling.patches import PatchSampler
from pipeline.volumes.volume import read_label
from pipeline.volumes.writing import write_image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available to torch"),
]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The demo's configuration on preprocessed phantoms."""
    folder = tmp_path_factory.mktemp("gpu")
    manifest.run(write_phantom_dataset(folder / "set", cases=8), folder / "mine.json", folds=4)
    config = load_config(packaged("demo.yaml"), [f"data.manifest={folder / 'mine.json'}"])
    config = config.changed(workspace=folder / "work")
    preprocess.run(config)
    return config


@pytest.fixture(scope="module")
def model(experiment: Config) -> Path:
    """A model trained on the GPU."""
    (folder,) = train.run(experiment, device="cuda")
    return folder / "models" / "best"


def test_train_and_evaluate(experiment: Config, model: Path) -> None:
    report = evaluate.run(str(model), device="cuda", workspace=experiment.workspace)
    assert not report.failures
    means = {found.class_name: found.metrics["dice"].mean for found in report.evaluation.summaries}
    assert means["left"] > 0.7
    assert means["right"] > 0.7


def test_segment_agrees_with_the_cpu(experiment: Config, model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "new" / "patient.nii.gz", make_phantom(777).images["T1"])
    labels = {}
    for device in ("cuda", "cpu"):
        segment.run(str(model), [tmp_path / "new"], tmp_path / device, device=device, workspace=experiment.workspace)
        labels[device] = read_label(tmp_path / device / "patient.nii.gz").array
    assert (labels["cuda"] > 0).any()
    assert (labels["cuda"] == labels["cpu"]).mean() > 0.995


def sampled(place: Place, device: str, workers: int = 0) -> Batches:
    """Batches of cases that are kept at a place, each change drawn for most patches."""
    random = np.random.default_rng(0)
    held: list[HeldCase] = []
    for number in range(6):
        label = np.zeros((40, 36, 30), np.uint8)
        label[8:20, 10:20, 5:15], label[20:32, 10:20, 5:15] = 1, 2
        voxels = {index: np.argwhere(label == index).astype(np.int32) for index in (1, 2)}
        image = random.normal(size=(2, *label.shape)).astype(np.float16)
        held.append(HeldCase(image, label, voxels, f"case_{number}", (True, True, number > 2)))
    often = {name: 0.7 for name in AugmentationSection.model_fields if name.endswith("_probability")}
    augmentation = Augmentation(
        AugmentationSection(**often, flip_axes=("x", "y")),  # type: ignore[arg-type]
        patch_size=(32, 28, 24),
        target_size=(28, 24, 20),
        left_right_axis=0,
        paired_classes=((1, 2),),
        num_classes=3,
        spacing_mm=(1.0, 1.0, 1.0),
        seed=0,
    )
    cases = [case.on(torch.device(device)) for case in held] if place == "GPU" else held
    sampler = PatchSampler(
        cases, patch_size=(28, 24, 20), read_size=augmentation.read_size, foreground_fraction=0.5, seed=0
    )
    return Batches(sampler, augmentation, batch_size=4, device=torch.device(device), workers=workers)


def test_patches_are_the_same_from_the_gpus_memory_and_the_hosts_and_nothing_waits_for_them() -> None:
    near, far = sampled("GPU", "cuda", workers=1), sampled("memory", "cuda", workers=2)
    for number in range(4):  # tables move to the device when they are first needed
        near(number), far(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pairs = [(near(number), far(number)) for number in (4, 5, 6, 9, 5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    near.close(), far.close()
    for (image, target), (other_image, other_target) in pairs:
        assert image.is_cuda
        assert torch.equal(image, other_image)
        assert torch.equal(target.classes, other_target.classes)
        assert target.annotated is not None
        assert other_target.annotated is not None
        assert torch.equal(target.annotated, other_target.annotated)
    assert not torch.equal(pairs[0][0][0], pairs[1][0][0])
    torch.testing.assert_close(pairs[1][0][0], pairs[4][0][0], atol=0, rtol=0)


def test_where_things_are_does_not_depend_on_the_device() -> None:
    for number in range(4):
        (_, on_gpu), (_, on_cpu) = sampled("GPU", "cuda")(number), sampled("memory", "cpu")(number)
        # Voxels that lie between two classes may round to either.
        assert (on_gpu.classes.cpu() == on_cpu.classes).float().mean() > 0.999
