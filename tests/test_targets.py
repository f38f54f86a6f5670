"""Targets that overlap or are known in part: from the data set to label maps and tables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from phantom_experiments import preprocessed_demo

from pipeline.config import Config
from pipeline.data.manifest import load_manifest
from pipeline.data.phantoms import NESTED_LABELS, make_phantom, write_phantom_dataset
from pipeline.evaluation.metrics import score_case
from pipeline.evaluation.scored import read_case_table
from pipeline.evaluation.structures import Structures
from pipeline.model import read_description
from pipeline.predictor import Predictor
from pipeline.stages import evaluate, manifest, train
from pipeline.stages.fold.calibrating import PASS_COST
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.models import BEST
from pipeline.training.losses import Target

REGIONS = ["organ", "core", "midline"]
CPU = torch.device("cpu")


def sparse_experiment(folder: Path, *settings: str, cases: int) -> Config:
    """The demo's configuration on nested phantoms of which every other one ignores half of the label and the rest lack
    the midline.
    """
    source = write_phantom_dataset(folder / "set", cases=cases, nested=True, sparse=True)
    manifest.run(source, folder / "sparse.json", folds=2)
    return preprocessed_demo(folder / "sparse.json", ("training.augmentation.flip_axes=[]", *settings))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> FoldTask:
    """A fold of an experiment on small patches, before it begins."""
    settings = ["preprocessing.patch_size=[16, 16, 16]", "training.foreground_fraction=1.0"]
    config = sparse_experiment(tmp_path_factory.mktemp("sparse"), *settings, cases=6)
    return FoldTask.prepare(config, load_manifest(config.data.manifest), 0, CPU)


def test_a_store_keeps_what_is_not_known(task: FoldTask) -> None:
    plan = task.plan
    assert (plan.output, plan.ignored_class, plan.ignore_label) == ("regions", 4, 4)
    assert plan.structures == {"organ": (1, 2), "core": (2,), "midline": (3,)}
    for case in task.manifest.cases:
        stored = task.store.read(case.id)
        assert stored.label is not None
        assert stored.reference is not None
        for label in (stored.label, stored.reference):
            known = case.annotated_classes is None
            assert [bool((label == index).any()) for index in (4, 3)] == [known, known]
        assert set(stored.class_voxels) == set(np.unique(stored.label).tolist()) - {0, 4}


def test_a_batch_says_what_of_it_is_known_and_is_learned_from(task: FoldTask) -> None:
    state = task.new_state()
    batches = task.batches(state.network)
    ignored, annotated = [], []
    for number in range(6):
        image, target = batches(number)
        assert isinstance(target, Target)
        assert target.annotated is not None
        ignored += (target.classes == 4).flatten(1).any(1).tolist()
        annotated += target.annotated.tolist()
        # Of one case nothing is ignored and the midline is not annotated, of another it is the other way round.
        assert not ((target.classes == 3).flatten(1).any(1) & ~target.annotated[:, 3]).any()
        assert state.network(image).shape[1] == len(REGIONS)
    assert any(ignored)
    assert {tuple(case) for case in annotated} == {(True, True, True, True), (True, True, True, False)}
    image, target = batches(0)
    loss = state.objective(image, target)
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_validation_scores_the_regions_that_people_looked_for(task: FoldTask) -> None:
    validation = task.validation(task.new_state().network)
    known = [case for case in task.manifest.cases if case.annotated_classes is None][:1]
    partly = [case for case in task.manifest.cases if case.annotated_classes is not None][:1]
    assert set(validation.scores(known)) == {"score", *(f"dice/{region}" for region in REGIONS)}
    assert set(validation.scores(partly)) == {"score", "dice/organ", "dice/core"}
    # A label in which nobody looked for anything is right about nothing.
    assert validation.scores([partly[0].changed(annotated_classes=())]) == {"score": 0.0}


def test_what_only_some_looked_for_is_not_calibrated_and_takes_no_time_for_it(task: FoldTask) -> None:
    assert 0 < len(task.calibration_cases) < len(task.validation_cases)
    assert 0 < task.calibration_passes < PASS_COST * 2
    partly = tuple(case.changed(annotated_classes=("core",)) for case in task.manifest.cases)
    nothing = replace(task, manifest=task.manifest.changed(cases=partly))
    assert (nothing.calibration_cases, nothing.calibration_passes) == ([], 0.0)


@pytest.mark.slow
def test_regions_are_learned_from_labels_of_which_part_is_not_known(tmp_path: Path) -> None:
    settings = ["training.budget={steps: 300}", "training.learning_rate=1e-2", "training.foreground_fraction=0.67"]
    config = sparse_experiment(tmp_path, *settings, cases=10)
    (run,) = train.run(config)
    description = read_description(run / BEST / "model.yaml")
    assert (description.output, description.num_classes) == ("regions", 3)
    predictor = Predictor.load(run / BEST)
    found: dict[str, list[float]] = {region: [] for region in REGIONS}
    for seed in range(50, 54):
        # Of new patients everything is known: also what is ignored, or not drawn, in the cases to learn from.
        phantom = make_phantom(seed, nested=True)
        label = predictor.predict(phantom.images)
        assert set(np.unique(label.array).tolist()) <= set(NESTED_LABELS.values())
        structures, spacing_mm = Structures(predictor.plan.structures), label.geometry.spacing_mm
        for row in score_case(label.array, phantom.label.array, spacing_mm, structures, 1.0, metrics=("dice",)):
            found[row.class_name].append(0.0 if row.status == "missed" else row.values["dice"])
    means = {region: float(np.mean(values)) for region, values in found.items()}
    # The nested region and the one around it; half of each is ignored in every other case.
    assert means["organ"] > 0.85
    assert means["core"] > 0.8
    # Drawn in every other case only.
    assert means["midline"] > 0.5
    refers_to_what_is_known(config)


def refers_to_what_is_known(config: Config) -> None:
    """The evaluation's table has the regions, and says of which nobody knows in a case."""
    report = evaluate.run(config)
    assert not report.failures
    annotated = {case.id: case.annotated_classes for case in load_manifest(config.data.manifest).cases}
    for case in read_case_table(report.folder / "cases.csv"):
        status = {row.class_name: row.status for row in case.rows}
        assert list(status) == REGIONS
        assert (status["midline"] == "not_annotated") is (annotated[case.case_id] is not None)
        assert "not_annotated" not in (status["organ"], status["core"])
        # Where nobody has looked for everything, a probability has nothing to be held against.
        assert bool(case.reliability) is (annotated[case.case_id] is None)
    midline = next(summary for summary in report.evaluation.summaries if summary.class_name == "midline")
    assert midline.not_annotated == sum(annotated[case.case_id] is not None for case in report.evaluation.cases) > 0
    assert "not annotated" in report.as_text()
