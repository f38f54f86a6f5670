"""Which cases take part where some lack a channel."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import make_model

from pipeline.config import Config, DataSection, PreprocessingSection
from pipeline.data.manifest import load_manifest
from pipeline.data.phantoms import write_phantom_dataset
from pipeline.errors import ManifestError
from pipeline.model import save_model
from pipeline.stages import check, evaluate, manifest, preprocess
from pipeline.stages.dataset import dataset_of
from pipeline.stages.workspace import Workspace


def experiment(folder: Path, lacking: int, rule: str) -> Config:
    """Six two-channel phantoms, of which the first few lack the second channel."""
    source = write_phantom_dataset(folder / "set", cases=6, channels=2, layout="folder")
    images = sorted(path for path in source.rglob("*T2*") if path.is_file())
    for path in images[:lacking]:
        path.unlink()
    manifest.run(source, folder / "mine.json", folds=2)
    return Config(
        name="mine",
        workspace=folder / "work",
        data=DataSection(manifest=folder / "mine.json"),
        preprocessing=PreprocessingSection(missing_channels=rule, patch_size=(16, 16, 16)),  # type: ignore[arg-type]
    )


def test_cases_that_lack_a_channel_stay_or_are_skipped_everywhere(tmp_path: Path) -> None:
    zero = experiment(tmp_path, 2, "zero")
    skip = zero.changed(preprocessing=zero.preprocessing.changed(missing_channels="skip"))
    assert check.run(zero.data.manifest, workspace=zero.workspace).cases == 6
    assert (len(dataset_of(zero).cases), len(dataset_of(skip).cases)) == (6, 4)
    assert (len(preprocess.run(zero).written), len(preprocess.run(skip).written)) == (6, 4)
    stores = [Workspace(config.workspace).store(config, "mine") for config in (zero, skip)]
    assert stores[0] != stores[1]


@pytest.mark.slow
def test_a_model_trained_without_them_knows_its_own_manifest_by_either_way(tmp_path: Path) -> None:
    config = experiment(tmp_path, 3, "skip")
    own = dataset_of(config)
    assert len(load_manifest(config.data.manifest).validation_cases(0)) > len(own.validation_cases(0)) > 0
    made = make_model(plan=preprocess.run(config).plan)
    description = made.description.changed(manifest_name=own.name, manifest_digest=own.digest(), fold=0)
    save_model(tmp_path / "model", replace(made, description=description))
    for named in (None, config.data.manifest):
        report = evaluate.run(str(tmp_path / "model"), config=config, manifest=named, workspace=config.workspace)
        assert [case.case_id for case in report.evaluation.cases] == [case.id for case in own.validation_cases(0)]
        assert not report.failures


def test_no_complete_case_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    config = experiment(tmp_path, 6, "skip")
    manifest_of_two = config.data.manifest
    text = manifest_of_two.read_text().replace('"T1": "MR"', '"T1": "MR",\n  "T2": "MR"')
    manifest_of_two.write_text(text)
    with pytest.raises(ManifestError, match=r"no case has all of T1, T2; set preprocessing\.missing_channels: zero"):
        dataset_of(config)
