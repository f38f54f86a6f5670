"""`medseg evaluate` with a network whose every prediction is known: each image spells out what will be predicted."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import NEAREST_MEAN, make_model, make_plan, nearest_mean
from tracking_databases import lay_database

from pipeline.confidence.calibration import Calibration, DiceRegression, save_calibration
from pipeline.confidence.reliability import Reliability
from pipeline.config import BudgetSection, Config, DataSection, EvaluationSection, TrainingSection
from pipeline.config_loading import dump_config
from pipeline.data.manifest import Case, ImageFile, Manifest, load_manifest, save_manifest
from pipeline.errors import ConfigError, EvaluationError, ManifestError, ModelError, PipelineError
from pipeline.evaluation.metrics import METRICS, score_case
from pipeline.evaluation.structures import Structures
from pipeline.geometry import Geometry
from pipeline.model import save_model
from pipeline.networks import NETWORKS
from pipeline.records import file_digest, write_json
from pipeline.stages import compare, evaluate
from pipeline.stages.evaluate import EvaluationReport
from pipeline.stages.evaluating.cases import choose, models_of
from pipeline.stages.models import FACTS
from pipeline.stages.workspace import Workspace
from pipeline.tracking import RunLog, read_state, send_pending
from pipeline.tracking.log import read_events
from pipeline.viewer.assets import niivue
from pipeline.volumes.stored import read_header
from pipeline.volumes.volume import Volume, read_label
from pipeline.volumes.writing import write_image, write_label

PLAN = make_plan(spacing_mm=(1.0, 1.0, 2.5))
VALUES = np.array(PLAN.class_values, np.uint8)
NATIVE = Geometry((20, 16, 10), np.diag([1.0, 1.0, 2.5, 1.0])).reoriented("PIR")
# id -> fold; a is an earlier visit of b's patient.
FOLDS = {"a": 0, "b": 0, "c": 1, "d": 1, "held_out": None}


def structures(seed: int) -> NDArray[np.uint8]:
    """Class indices with two boxes, elsewhere for each seed from 0 to 9."""
    classes = np.zeros(NATIVE.shape, np.uint8)
    x, y, z = 2 + seed, 2, 3
    classes[x : x + 3, y : y + 6, z : z + 6] = 1
    classes[x + 3 : x + 5, y : y + 6, z : z + 6] = 2
    return classes


def predicted(reference: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What the network will say of a case: the reference one voxel further on."""
    return np.roll(reference, 1, axis=1)


def write_case(
    root: Path, case_id: str, reference: NDArray[np.uint8], prediction: NDArray[np.uint8], fold: int | None
) -> Case:
    """Write a case whose image makes the network predict `prediction`."""
    image, label = root / f"{case_id}_T1.nii.gz", root / f"{case_id}_label.nii.gz"
    write_image(image, Volume(100 * prediction[None].astype(np.float32), NATIVE))
    write_label(label, Volume(VALUES[reference], NATIVE))
    patient = "patient_ab" if case_id in "ab" else f"patient_{case_id}"
    files = {"T1": ImageFile(path=image.name, sha256=file_digest(image))}
    return Case(id=case_id, patient=patient, images=files, label=ImageFile(path=label.name), fold=fold)


def write_manifest(path: Path, cases: list[Case], **changes: object) -> Manifest:
    """Write a manifest of cases in the folder `images` beside it."""
    manifest = Manifest(
        name="phantoms", root=path.parent / "images", channels={"T1": "MR"}, labels=PLAN.labels, cases=tuple(cases)
    ).changed(**changes)
    save_manifest(manifest, path)
    return load_manifest(path)


def write_run(config: Config, manifest: Manifest, fold: int) -> Path:
    """Write the run folder of a trained fold and return its best model."""
    folder = config.workspace / "runs" / config.name / f"fold_{fold}"
    made = make_model(plan=PLAN, network=NEAREST_MEAN)
    description = made.description.changed(name=config.name, manifest_digest=manifest.digest(), fold=fold)
    save_model(folder / "models" / "best", replace(made, description=description, config_text=dump_config(config)))
    (folder / "config.yaml").write_text(dump_config(config))
    return folder / "models" / "best"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """An experiment with two trained folds."""
    monkeypatch.setitem(NETWORKS, NEAREST_MEAN.name, nearest_mean)
    path = tmp_path / "phantoms.json"
    references = {case: structures(seed) for seed, case in enumerate(FOLDS)}
    cases = [write_case(tmp_path / "images", case, r, predicted(r), FOLDS[case]) for case, r in references.items()]
    manifest = write_manifest(path, cases)
    config = Config(
        name="tiny",
        workspace=tmp_path / "work",
        data=DataSection(manifest=path),
        training=TrainingSection(budget=BudgetSection(steps=300)),
        evaluation=EvaluationSection(surface_tolerance_mm=0.5, bootstrap_samples=50, picture_cases=1),
    )
    lay_database(config.workspace)
    for fold in (0, 1):
        write_run(config, manifest, fold)
    return config


def best(config: Config, fold: int = 0) -> str:
    return str(config.workspace / "runs" / config.name / f"fold_{fold}" / "models" / "best")


def ids(report: EvaluationReport) -> list[str]:
    return [case.case_id for case in report.evaluation.cases]


def test_scores_are_those_of_the_known_prediction_on_the_native_grid(config: Config) -> None:
    report = evaluate.run(best(config))
    assert ids(report) == ["a", "b"]
    assert report.failures == {}
    for seed, case in enumerate(report.evaluation.cases):
        reference = structures(seed)
        expected = score_case(predicted(reference), reference, NATIVE.spacing_mm, Structures.of_labels(PLAN), 0.5)
        assert list(case.rows) == expected
        assert 0 < case.rows[0].values["dice"] < 1
        kept = report.folder / "predictions" / f"{case.case_id}.nii.gz"
        np.testing.assert_array_equal(read_label(kept).array, VALUES[predicted(reference)])
        assert read_header(kept).geometry.matches(NATIVE, 1e-6)


def probabilities_of(reference: NDArray[np.uint8], temperature: float) -> NDArray[np.float64]:
    """(K, V) probabilities of the network's logits for what it predicts."""
    intensity, means = 100.0 * predicted(reference).ravel(), np.array([0.0, 100.0, 200.0])
    logits = (means[:, None] * intensity - means[:, None] ** 2 / 2) / temperature
    weights = np.exp(logits - logits.max(axis=0))
    return np.asarray(weights / weights.sum(axis=0))


def slow_reliability(reference: NDArray[np.uint8], temperature: float) -> list[float]:
    """ECE and Brier over all voxels, and over the foreground."""
    probabilities = probabilities_of(reference, temperature)
    said, drawn = predicted(reference).ravel(), reference.ravel()
    squares = ((probabilities - (np.arange(3)[:, None] == drawn)) ** 2).sum(axis=0)
    # The three confidences differ by less than a bin: all voxels lie in the last one.
    gap = probabilities.max(axis=0) - (said == drawn)
    assert probabilities.max(axis=0).min() > 14 / 15
    inside = (said > 0) | (drawn > 0)
    return [abs(gap.mean()), squares.mean(), abs(gap[inside].mean()), squares[inside].mean()]


def calibration(temperature: float) -> Calibration:
    """A calibration by which the left structure's Dice is half of what is expected."""
    unknown = Reliability(ece=0.0, brier=0.0, ece_foreground=None, brier_foreground=None)
    left = DiceRegression(intercept=0, expected_dice=0.5, entropy=0, log_volume=0, cases=9, mae=0.1, low=0.4)
    return Calibration(
        temperature=temperature, cases=9, before=unknown, after=unknown, labels={"left": left, "right": None}
    )


def test_the_models_confidence_is_held_against_the_references(config: Config) -> None:
    save_calibration(Path(best(config)), calibration(1000.0))
    report = evaluate.run(best(config))
    assert (report.folder / "predicted_dice.png").is_file()
    summary = json.loads((report.folder / "summary.json").read_text())
    (Path(best(config)) / "calibration.json").unlink()
    found, bare = report.evaluation, evaluate.run(best(config)).evaluation
    assert bare.dice_predictions == ()
    assert not (report.folder / "predicted_dice.png").exists()
    for seed, (case, before) in enumerate(zip(found.cases, bare.cases, strict=True)):
        names = list(before.reliability)
        assert names == ["ece", "brier", "ece_foreground", "brier_foreground"]
        at_one = slow_reliability(structures(seed), 1.0)
        assert list(before.reliability.values()) == pytest.approx(at_one, abs=1e-5)
        assert [case.reliability[f"{name}_uncalibrated"] for name in names] == pytest.approx(at_one, abs=1e-5)
        calibrated = slow_reliability(structures(seed), 1000.0)
        assert [case.reliability[name] for name in names] == pytest.approx(calibrated, abs=1e-5)
        assert abs(calibrated[1] - at_one[1]) > 1e-4
        assert case.rows == before.rows  # labels depend on no calibration
        left = probabilities_of(structures(seed), 1000.0)[1]
        found_left = predicted(structures(seed)).ravel() == 1
        expected_dice = 2 * left[found_left].sum() / (left.sum() + found_left.sum())
        assert case.predicted_dice == {"left": pytest.approx(0.5 * expected_dice, rel=1e-4)}
    known, unknown, mean = found.dice_predictions
    errors = [abs(case.predicted_dice["left"] - case.rows[0].values["dice"]) for case in found.cases]
    assert (known.cases, unknown.cases, mean.cases) == (2, 0, 2)
    assert known.mae == mean.mae == pytest.approx(np.mean(errors))
    assert summary["reliability"]["ece"]["mean"] == pytest.approx(
        np.mean([case.reliability["ece"] for case in found.cases])
    )
    assert summary["predicted_dice"]["right"]["mean_absolute_error"] is None


def test_settings_can_be_overridden_for_a_model_too(config: Config) -> None:
    narrow = evaluate.run(best(config))
    wide = evaluate.run(best(config), overrides=["evaluation.surface_tolerance_mm=3"])
    assert (narrow.evaluation.tolerance_mm, wide.evaluation.tolerance_mm) == (0.5, 3.0)
    rows = [report.evaluation.cases[0].rows[0].values["nsd"] for report in (narrow, wide)]
    assert rows[0] < rows[1]


def test_structures_are_counted_lesion_by_lesion_where_the_configuration_says_so(config: Config) -> None:
    assert not (evaluate.run(best(config)).folder / "lesions.csv").exists()
    settings = ["evaluation.lesions=[left]", "evaluation.lesion_iou_thresholds=[0.3, 0.9]"]
    report = evaluate.run(best(config), overrides=settings)
    with (report.folder / "lesions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["case"], line["class"], line["side"], line["status"]) for line in lines] == [
        (case, "left", side, "matched") for case in "ab" for side in ("reference", "prediction")
    ]
    # A box of 3 x 6 x 6 voxels of 2.5 mm3 beside itself one voxel further on, along one axis of 6 voxels: 5 of 7.
    assert {line["volume_ml"] for line in lines} == {"0.27"}
    assert [float(line["iou"]) for line in lines] == pytest.approx([5 / 7] * 4, rel=1e-5)
    drawn = NATIVE.to_mm(np.argwhere(structures(1) == 1).mean(axis=0))
    assert [float(lines[2][f"{axis}_mm"]) for axis in "xyz"] == pytest.approx(drawn, rel=1e-5)
    found = json.loads((report.folder / "summary.json").read_text())["lesions"]["left"]
    assert (found["lesions"], found["lesions_detected"], found["lesions_spurious"]) == (2, 2, 0)
    means = {name: found["metrics"][f"lesion_{name}"]["mean"] for name in ("f1_iou30", "pq_iou30", "f1_iou90")}
    assert means == {"f1_iou30": 1, "pq_iou30": pytest.approx(5 / 7), "f1_iou90": 0}
    assert "F1, IoU 0.9" in report.as_text()
    with (report.folder / "cases.csv").open(newline="") as file:
        assert [line["lesions"] for line in csv.DictReader(file)] == ["1", "", "1", ""]
    with pytest.raises(ConfigError, match=r"evaluation\.lesions: liver: unknown; what is scored are left, right"):
        evaluate.run(best(config), overrides=["evaluation.lesions=[left, liver]"])


def test_results_lie_in_the_run_folder(config: Config) -> None:
    report = evaluate.run(best(config))
    assert report.folder == Path(best(config)).parents[1] / "evaluation" / "fold"
    assert sorted(path.name for path in report.folder.iterdir()) == [
        "cases.csv",
        "distributions.png",
        "pictures",
        "predictions",
        "report.html",
        "summary.html",
        "summary.json",
    ]
    with (report.folder / "cases.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["case"], line["fold"], line["class"]) for line in lines] == [
        (case, "0", name) for case in "ab" for name in ("left", "right")
    ]
    summary = json.loads((report.folder / "summary.json").read_text())
    mean = np.mean([float(line["dice"]) for line in lines])
    assert summary["classes"]["mean"]["metrics"]["dice"]["mean"] == pytest.approx(mean, abs=1e-6)
    # a and b are two visits of one patient: there is nothing to draw an interval from.
    assert summary["classes"]["left"]["metrics"]["dice"]["low"] is None
    assert {path.name.split("_")[1] for path in (report.folder / "pictures").iterdir()} == {"worst", "best"}
    assert str(report.folder / "report.html") in report.as_text()


@pytest.mark.parametrize(
    ("cases", "expected"), [("fold", ["c", "d"]), ("test", ["held_out"]), ("all", ["c", "d", "held_out"])]
)
def test_a_model_is_never_scored_on_what_it_was_trained_on(config: Config, cases: str, expected: list[str]) -> None:
    report = evaluate.run(best(config, 1), cases=cases)
    assert ids(report) == expected
    assert report.folder.name == cases


@pytest.mark.slow
def test_an_experiment_is_evaluated_out_of_fold(config: Config) -> None:
    report = evaluate.run(config)
    assert [(case.case_id, case.fold) for case in report.evaluation.cases] == [("a", 0), ("b", 0), ("c", 1), ("d", 1)]
    assert report.folder == config.workspace / "runs" / "tiny" / "evaluation" / "fold"
    assert report.evaluation.title == "tiny, folds 0 1"
    shutil.rmtree(config.workspace / "runs" / "tiny" / "fold_1")
    assert ids(evaluate.run(config, cases="all")) == ["a", "b", "held_out"]
    shutil.rmtree(config.workspace / "runs" / "tiny" / "fold_0")
    with pytest.raises(ModelError, match="no fold is trained"):
        evaluate.run(config)


def test_several_folds_are_an_ensemble_on_cases_that_none_has_seen(config: Config) -> None:
    report = evaluate.run(config, cases="test")
    assert [(case.case_id, case.fold) for case in report.evaluation.cases] == [("held_out", None)]
    assert report.folder == config.workspace / "runs" / "tiny" / "evaluation" / "test"
    assert report.evaluation.title == "tiny, folds 0 1, ensemble"
    assert report.evaluation.facts["model"] == f"{best(config, 0)}, {best(config, 1)}"


def test_all_cases_of_several_folds_are_those_that_none_has_seen(config: Config) -> None:
    manifest, workspace = load_manifest(config.data.manifest), Workspace(config.workspace)
    experiment = str(workspace.experiment(config.name))
    (together,) = choose(models_of(experiment, workspace), manifest, config, "all")
    assert [case.id for case in together.cases] == ["held_out"]
    assert (len(together.models), together.fold, together.seen) == (2, None, {})
    first, second = choose(models_of(experiment, workspace), manifest, config, "fold")
    assert [[case.id for case in task.cases] for task in (first, second)] == [["a", "b"], ["c", "d"]]
    without = manifest.changed(cases=tuple(case.changed(fold=case.fold or 0) for case in manifest.cases))
    for fold in (0, 1):
        write_run(config, without, fold)
    with pytest.raises(ManifestError, match=r"no labelled case.*--cases all.*2 models leave those that none of them"):
        choose(models_of(experiment, workspace), without, config, "all")


def test_folds_that_were_not_trained_alike_are_no_experiment(config: Config) -> None:
    places = Workspace(config.workspace)
    runs = [config.workspace / "runs" / config.name / f"fold_{fold}" for fold in (0, 1)]
    facts = {"configuration": "a", "plan": "p", "manifest": "m", "fold": 0, "initial model": None}
    write_json(runs[0] / FACTS, facts)
    assert len(models_of(config, places)) == 2  # the other says nothing of itself
    write_json(runs[1] / FACTS, {**facts, "fold": 1, "initial model": "other"})
    assert len(models_of(config, places)) == 2
    write_json(runs[1] / FACTS, {**facts, "configuration": "b"})
    with pytest.raises(ModelError, match=r"tiny: its folds are not of one configuration: fold_0 \| fold_1; train"):
        evaluate.run(config)
    with pytest.raises(ModelError, match="not of one configuration"):
        models_of(str(runs[0].parent), places)
    assert models_of(best(config, 1), places) == [Path(best(config, 1))]


def test_how_volumes_are_predicted_belongs_to_the_model(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"inference: overlap is 0\.75: how .* trained with overlap 0\.5; put that"):
        evaluate.run(best(config), overrides=["inference.overlap=0.75"])
    with pytest.raises(ConfigError, match="belongs to the model"):
        evaluate.run(config.changed(inference=config.inference.changed(flip_axes=("x",))))


def test_what_any_member_has_seen_is_left_out(config: Config, tmp_path: Path) -> None:
    own = {case.id: case for case in load_manifest(config.data.manifest).cases}
    renamed = [case.changed(id=f"again_{case.id}") for case in (own["a"], own["c"], own["held_out"])]
    write_manifest(tmp_path / "others.json", renamed, name="others")
    report = evaluate.run(config, manifest=tmp_path / "others.json")
    assert ids(report) == ["again_held_out"]
    assert report.failures.keys() == {"again_a", "again_c"}


def test_two_models_for_one_fold_are_refused(config: Config) -> None:
    shutil.copytree(Path(best(config)).parents[1], config.workspace / "runs" / config.name / "fold_0_again")
    with pytest.raises(ModelError, match=r"two models for one fold among .*fold_0_again"):
        evaluate.run(config)


def test_a_broken_case_is_listed_and_the_rest_go_on(config: Config) -> None:
    image = load_manifest(config.data.manifest).root / "a_T1.nii.gz"
    image.write_bytes(image.read_bytes()[:200])
    report = evaluate.run(best(config))
    assert ids(report) == ["b"]
    assert report.failures.keys() == {"a"}
    assert "a_T1.nii.gz" in report.failures["a"]
    assert "failed: a:" in report.as_text()


def test_a_cross_validation_with_a_broken_case_is_incomplete(config: Config) -> None:
    image = load_manifest(config.data.manifest).root / "a_T1.nii.gz"
    image.write_bytes(image.read_bytes()[:200])
    found = evaluate.run(config).evaluation.cross_validation
    assert found is not None
    assert (found.failed, found.is_complete) == (("a",), False)
    assert "cases that failed: a" in found.remark


@pytest.mark.slow
def test_ensembles_are_compared_on_the_cases_that_they_labelled_together(config: Config) -> None:
    for fold in (0, 1):
        shutil.copytree(best(config, fold), Path(best(config, fold)).with_name("last"))
    other = config.changed(name="other")
    shutil.copytree(config.workspace / "runs" / config.name, config.workspace / "runs" / other.name)
    for path in (config.workspace / "runs" / other.name).rglob("*.yaml"):
        path.write_text(path.read_text().replace("name: tiny", "name: other"))
    for one in (config, other):
        evaluate.run(one, cases="test")
    experiments = [str(config.workspace / "runs" / name) for name in ("tiny", "other")]
    result = compare.run(experiments, cases="test", workspace=config.workspace).result
    assert result.cases == ("held_out",)
    (whole,) = result.members[0].runs
    (single,) = compare.run([f"{name}/evaluation/test" for name in experiments]).result.members[0].runs
    assert (whole.fold, whole.seed, [case.case_id for case in whole.cases]) == (None, 0, ["held_out"])
    assert whole == single
    # What the ensemble scored is not one fold's.
    with pytest.raises(EvaluationError, match="fold_0: its best model is not evaluated on --cases test"):
        compare.run([f"{name}/fold_0" for name in experiments], cases="test", workspace=config.workspace)
    for name in experiments:
        evaluate.run(f"{name}/fold_0/models/best", cases="test")
    alone = compare.run([f"{name}/fold_0" for name in experiments], cases="test", workspace=config.workspace).result
    assert alone.members[0].runs[0].fold == 0


def test_where_every_case_fails_each_is_listed_and_no_earlier_picture_stays(config: Config) -> None:
    assert any((evaluate.run(best(config)).folder / "pictures").iterdir())
    for case in "ab":
        (load_manifest(config.data.manifest).root / f"{case}_label.nii.gz").unlink()
    report = evaluate.run(best(config))
    assert report.failures.keys() == {"a", "b"}
    assert report.as_text().count("failed: ") == 2
    assert json.loads((report.folder / "summary.json").read_text())["classes"] == {}
    assert (report.folder / "report.html").is_file()
    assert not list(report.folder.rglob("*.png"))


def test_missed_and_spurious_are_counted_and_have_no_number(config: Config, tmp_path: Path) -> None:
    reference, nothing = structures(9), np.zeros(NATIVE.shape, np.uint8)
    cases = [
        write_case(tmp_path / "images", "missed", reference, nothing, None),
        write_case(tmp_path / "images", "spurious", np.where(reference == 2, 0, reference), reference, None),
        write_case(tmp_path / "images", "empty", nothing, nothing, None),
    ]
    write_manifest(tmp_path / "others.json", cases, name="others")
    report = evaluate.run(best(config), manifest=tmp_path / "others.json")
    assert report.folder.name == "others"
    left, right, mean = report.evaluation.summaries
    assert [(s.scored, s.missed, s.spurious) for s in (left, right, mean)] == [(1, 1, 0), (0, 1, 1), (1, 2, 1)]
    assert left.metrics["dice"].mean == 1
    assert right.metrics["dice"].cases == 0
    assert report.failures == {}


def test_cases_of_another_manifest_that_were_trained_on_are_left_out(config: Config, tmp_path: Path) -> None:
    own = {case.id: case for case in load_manifest(config.data.manifest).cases}
    renamed = [case.changed(id=f"again_{case.id}") for case in (own["a"], own["c"], own["held_out"])]
    write_manifest(tmp_path / "others.json", renamed, name="others")
    report = evaluate.run(best(config, 0), manifest=tmp_path / "others.json")
    assert ids(report) == ["again_a", "again_held_out"]
    assert report.failures == {"again_c": "the model was trained on its image, as case 'c'"}


def test_what_cannot_be_evaluated_is_refused(config: Config, tmp_path: Path) -> None:
    manifest = load_manifest(config.data.manifest)
    with pytest.raises(PipelineError, match="--cases none: unknown; use fold, test, all"):
        evaluate.run(best(config), cases="none")
    write_manifest(tmp_path / "names.json", list(manifest.cases), labels={"background": 0, "left": 7, "right": 1})
    with pytest.raises(ManifestError, match="labels are"):
        evaluate.run(best(config), manifest=tmp_path / "names.json")
    write_manifest(tmp_path / "changed.json", [case.changed(fold=0) for case in manifest.cases])
    with pytest.raises(ManifestError, match="has changed since"):
        evaluate.run(best(config), manifest=tmp_path / "changed.json")
    write_manifest(tmp_path / "bare.json", [case.changed(label=None) for case in manifest.cases], name="bare")
    with pytest.raises(ManifestError, match="no labelled case"):
        evaluate.run(best(config), manifest=tmp_path / "bare.json")
    config.data.manifest.unlink()
    with pytest.raises(ManifestError, match="--manifest"):
        evaluate.run(best(config))


def test_a_model_from_elsewhere_writes_to_the_workspace(config: Config, tmp_path: Path) -> None:
    shutil.copytree(best(config), tmp_path / "elsewhere")
    report = evaluate.run(str(tmp_path / "elsewhere"), workspace=tmp_path / "w")
    assert report.folder == tmp_path / "w" / "evaluations" / "tiny_fold_0" / "fold"
    assert ids(report) == ["a", "b"]
    named = evaluate.run(str(tmp_path / "elsewhere"), workspace=tmp_path / "w", out=tmp_path / "results")
    assert (named.folder / "report.html").is_file()
    assert named.folder == tmp_path / "results"


def test_the_last_model_does_not_overwrite_the_best_ones_results(config: Config) -> None:
    last = Path(best(config)).with_name("last")
    shutil.copytree(best(config), last)
    assert evaluate.run(str(last)).folder.name == "fold_last"


def viewer_facts(report: EvaluationReport) -> dict[str, Any]:
    """What the page's viewer knows of the cases; nothing where there is no viewer."""
    found = re.search(r'id="viewer-facts">(.*?)</script>', (report.folder / "report.html").read_text())
    return json.loads(found.group(1)) if found else {}


@pytest.mark.slow
def test_the_page_lets_people_look_at_the_cases_the_worst_first_as_far_as_there_is_room(config: Config) -> None:
    if niivue() is None:
        pytest.skip("NiiVue is not installed; `make setup` or `medseg install-viewer` does it")
    report = evaluate.run(config)
    facts = viewer_facts(report)
    assert [one["name"] for one in facts["classes"]] == ["left", "right"]
    dice = {case.case_id: np.mean([row.values["dice"] for row in case.rows]) for case in report.evaluation.cases}
    assert {case["name"]: case["score"] for case in facts["cases"]} == pytest.approx(dice)
    assert [case["score"] for case in facts["cases"]] == sorted(dice.values())
    assert all(case["shown"] for case in facts["cases"])
    assert "viewer-facts" not in (report.folder / "summary.html").read_text()  # which goes to MLflow
    sizes = {
        number: len(text)
        for number, text in re.findall(
            r'id="viewer-volumes-(\d)">(.*?)</script>', (report.folder / "report.html").read_text()
        )
    }
    # Room for one and a half: picked first are the worst, the median and the best.
    room = 1.5 * max(sizes.values()) / 1e6
    changed = config.changed(evaluation=config.evaluation.changed(viewer_mb=room))
    small = viewer_facts(evaluate.run(changed))
    assert [case["shown"] for case in small["cases"]] == [True, False, False, False]
    assert small["cases"][0]["mark"] == "worst"
    off = config.changed(evaluation=config.evaluation.changed(viewer="off"))
    assert viewer_facts(evaluate.run(off)) == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")
def test_everything_is_in_mlflow(config: Config) -> None:
    from mlflow import MlflowClient

    run_folder = Path(best(config)).parents[1]
    RunLog.create(run_folder, uri=None, workspace=config.workspace, experiment="phantoms", name="tiny fold 0").close()
    report = evaluate.run(best(config), overrides=["evaluation.lesions=[left]"])
    assert [line.event["kind"] for line in read_events(run_folder)].count("table") == 1
    client = MlflowClient(f"sqlite:///{config.workspace / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "phantoms"]
    (found,) = client.search_runs([experiment.experiment_id])
    for summary in report.evaluation.summaries:
        for name in METRICS:
            logged = found.data.metrics[f"evaluation/fold/{name}/{summary.class_name}"]
            assert logged == pytest.approx(summary.metrics[name].mean)
    assert found.data.metrics["evaluation/fold/missed/mean"] == 0
    (lesions,) = report.evaluation.lesions
    for name, value in lesions.as_metrics("evaluation/fold").items():
        assert found.data.metrics[name] == pytest.approx(value)
    assert found.data.metrics["evaluation/fold/lesion_f1_iou50/left"] == 1
    assert "evaluation/fold/lesions.csv" in {
        file.path for file in client.list_artifacts(found.info.run_id, "evaluation/fold")
    }
    ece = report.evaluation.reliability["ece"].mean
    assert found.data.metrics["evaluation/fold/ece"] == pytest.approx(ece)
    top = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"summary.html", "distributions.png", "evaluation_fold.json", "evaluation"} <= top
    assert "report.html" not in top  # its volumes stay here
    assert [entry.dataset.name for entry in found.inputs.dataset_inputs] == ["phantoms"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")
def test_a_model_out_of_mlflow_is_evaluated_into_its_own_run(config: Config, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    run_folder = Path(best(config)).parents[1]
    run = RunLog.create(run_folder, uri=None, workspace=config.workspace, experiment="phantoms", name="tiny fold 0")
    run.model(Path(best(config)), register_as="phantoms", alias="champion")
    assert send_pending(run_folder)
    run_id, elsewhere = str(read_state(run_folder).run_id), tmp_path / "elsewhere"
    uri = f"sqlite:///{config.workspace / 'mlflow.db'}"
    report = evaluate.run("models:/phantoms@champion", cases="test", workspace=elsewhere, tracking_uri=uri)
    assert report.folder.is_relative_to(elsewhere / "evaluations")
    client = MlflowClient(uri)
    found = client.get_run(run_id)
    dice = report.evaluation.summaries[0].metrics["dice"].mean
    assert found.data.metrics["evaluation/test/dice/left"] == pytest.approx(dice)
    again = evaluate.run(f"runs:/{run_id}", cases="test", workspace=elsewhere, tracking_uri=uri)
    assert again.folder == report.folder
    assert len(client.search_runs([found.info.experiment_id])) == 1
    assert len(client.get_metric_history(run_id, "evaluation/test/dice/left")) == 2


@pytest.mark.gpu
def test_on_a_gpu_the_scores_are_those_of_the_cpu(config: Config) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    on_gpu, on_cpu = evaluate.run(best(config), device="cuda"), evaluate.run(best(config), device="cpu")
    assert [case.rows for case in on_gpu.evaluation.cases] == [case.rows for case in on_cpu.evaluation.cases]
