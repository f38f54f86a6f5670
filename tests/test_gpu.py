"""Each stage that uses a GPU, on one: `pytest -m gpu`; skipped where there is none."""

from pathlib import Path

import pytest
import torch

from pipeline.config import Config
from pipeline.config_loading import load_config, packaged
from pipeline.data.phantoms import make_phantom, write_phantom_dataset
from pipeline.stages import evaluate, manifest, preprocess, segment, train
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
