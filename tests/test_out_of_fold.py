"""Out-of-fold predictions: what is kept of an evaluation, when it is taken again, and the folds beside each other."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from known_predictions import best_of, experiment_of, known_experiment, shifted_cases
from test_evaluate import NATIVE, VALUES, predicted, structures
from tiny_models import NEAREST_MEAN

from pipeline.config import Config
from pipeline.data.manifest import load_manifest
from pipeline.evaluation.cross_validation import cross_validate, cv_metrics
from pipeline.evaluation.metrics import METRICS, Row
from pipeline.evaluation.scored import ScoredCase
from pipeline.evaluation.statistics import MEAN, summarise
from pipeline.model import model_digest
from pipeline.networks import NETWORKS
from pipeline.stages import evaluate
from pipeline.stages.evaluate import EvaluationReport
from pipeline.stages.evaluating.out_of_fold import OutOfFold
from pipeline.stages.models import LAST
from pipeline.volumes.volume import Volume, read_image, read_label
from pipeline.volumes.writing import write_label

NAN = float("nan")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """An experiment with two trained folds, cases a and b in one, c and d in the other."""
    return known_experiment(tmp_path, monkeypatch, shifted_cases())


def ids(report: EvaluationReport) -> list[str]:
    return [case.case_id for case in report.evaluation.cases]


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whatever needs a network from now on fail."""
    monkeypatch.delitem(NETWORKS, NEAREST_MEAN.name)


def test_an_evaluation_keeps_each_case_with_its_fold_and_scores(config: Config) -> None:
    report = evaluate.run(config)
    store = OutOfFold(experiment_of(config))
    for seed, case in enumerate("abcd"):
        np.testing.assert_array_equal(read_label(store.label_of(case)).array, VALUES[predicted(structures(seed))])
    with (store.folder / "cases.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["case"], line["fold"]) for line in lines[::2]] == [("a", "0"), ("b", "0"), ("c", "1"), ("d", "1")]
    models = [best_of(config, fold) for fold in (0, 1)]
    records = store.of_models(models)
    assert tuple(record.scored for record in records) == report.evaluation.cases
    assert [record.model for record in records[::2]] == [model_digest(model) for model in models]
    assert [record.case for record in store.of_models(models[1:])] == ["c", "d"]
    assert not list(store.folder.glob(".tmp-*"))


def test_cases_of_no_fold_are_not_kept(config: Config) -> None:
    assert ids(evaluate.run(config, cases="test")) == ["held_out"]
    assert ids(evaluate.run(str(best_of(config, 0)), cases="all")) == ["a", "b", "held_out"]
    assert sorted(path.stem for path in (experiment_of(config) / "out_of_fold").glob("*.json")) == ["a", "b"]


def test_what_has_not_changed_needs_no_network(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    folds = [evaluate.run(str(best_of(config, fold))) for fold in (0, 1)]  # as `medseg run` does it
    no_network(monkeypatch)
    report = evaluate.run(config)
    assert report.evaluation.cases == sum((fold.evaluation.cases for fold in folds), ())
    assert (report.evaluation.device, report.failures) == (folds[0].evaluation.device, {})
    np.testing.assert_array_equal(
        read_label(report.folder / "predictions" / "c.nii.gz").array, VALUES[predicted(structures(2))]
    )
    with pytest.raises(Exception, match="nearest_mean"):
        evaluate.run(config, overwrite=True)


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["label", "model", "label map"])
def test_what_has_changed_is_predicted_anew(config: Config, changed: str) -> None:
    before = {case.case_id: case for case in evaluate.run(config).evaluation.cases}
    store = OutOfFold(experiment_of(config))
    stamps = {case: store.label_of(case).stat().st_mtime_ns for case in "abcd"}
    if changed == "label":
        label = load_manifest(config.data.manifest).root / "a_label.nii.gz"
        write_label(label, Volume(VALUES[predicted(structures(0))], NATIVE))
    elif changed == "model":
        description = best_of(config, 0) / "model.yaml"
        description.write_text(description.read_text().replace("step: 300", "step: 301"))
    else:
        store.label_of("a").unlink()
    after = {case.case_id: case for case in evaluate.run(config).evaluation.cases}
    anew = [case for case in "abcd" if store.label_of(case).stat().st_mtime_ns != stamps[case]]
    assert anew == (["a", "b"] if changed == "model" else ["a"])
    assert (after["a"].rows[0].values["dice"] == 1.0) == (changed == "label")
    assert after["c"] == before["c"]


@pytest.mark.slow
def test_another_tolerance_scores_what_is_kept_anew(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = evaluate.run(config).evaluation
    no_network(monkeypatch)
    wide = evaluate.run(config.changed(evaluation=config.evaluation.changed(surface_tolerance_mm=3.0))).evaluation
    for first, second in zip(narrow.cases, wide.cases, strict=True):
        assert first.rows[0].values["nsd"] < second.rows[0].values["nsd"]
        assert first.rows[0].values["dice"] == second.rows[0].values["dice"]
    # What is read from here on, by `find-best` too, is of the tolerance it says.
    kept = OutOfFold(experiment_of(config)).of_models([best_of(config, fold) for fold in (0, 1)])
    assert tuple(record.scored for record in kept) == wide.cases
    assert {record.tolerance_mm for record in kept} == {3.0}


@pytest.mark.slow
def test_a_damaged_record_is_predicted_anew(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    first = evaluate.run(config).evaluation
    record = experiment_of(config) / "out_of_fold" / "b.json"
    record.write_text(record.read_text()[:100])
    again = evaluate.run(config).evaluation
    assert [case.rows for case in again.cases] == [case.rows for case in first.cases]
    assert "b.json: cannot be read" in caplog.text


@pytest.mark.slow
def test_probabilities_are_kept_where_they_are_asked_for(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate.run(config)
    store = OutOfFold(experiment_of(config))
    assert not store.probabilities_of("a").exists()
    evaluate.run(config, probabilities=True)
    found = read_image(store.probabilities_of("a"), 0).array[0]
    np.testing.assert_allclose(found, predicted(structures(0)) == 1, atol=1 / 255)
    no_network(monkeypatch)
    assert evaluate.run(config, probabilities=True).failures == {}


def case(case_id: str, fold: int, *dice: float) -> ScoredCase:
    """A scored case of which only the Dice of its classes is known."""
    rows = [
        Row(name, "scored", 1.0, 1.0, {**dict.fromkeys(METRICS, NAN), "dice": value})
        for name, value in zip(("left", "right"), dice, strict=True)
    ]
    return ScoredCase(case_id, case_id, fold, tuple(rows), 1.0, None)


def test_folds_beside_each_other_by_hand() -> None:
    cases = [case("a", 0, 0.9, 0.7), case("b", 0, 0.7, NAN), case("c", 2, 0.6, 0.8)]
    found = cross_validate(cases)
    left, right, mean = (found.spreads[name, "dice"] for name in ("left", "right", MEAN))
    assert left.by_fold == {0: pytest.approx(0.8), 2: pytest.approx(0.6)}
    assert left.sd == pytest.approx(0.2 / math.sqrt(2))
    assert right.by_fold == {0: pytest.approx(0.7), 2: pytest.approx(0.8)}
    # By case: 0.8 and 0.7, the second over the one class that is scored; then 0.7.
    assert mean.by_fold == {0: pytest.approx(0.75), 2: pytest.approx(0.7)}
    assert math.isnan(found.spreads["left", "hd95"].sd)
    summaries = summarise({one.case_id: one.rows for one in cases}, samples=10, seed=0)
    metrics = cv_metrics(found, summaries)
    assert metrics["cv/folds"] == 2
    assert metrics["cv/dice/left"] == pytest.approx(2.2 / 3)
    assert metrics["cv/dice/left_fold_sd"] == pytest.approx(0.2 / math.sqrt(2))
    assert not [name for name in metrics if "hd95" in name]
    assert cv_metrics(cross_validate(cases, missing=[1]), summaries) == {}
    assert cv_metrics(cross_validate(cases, failed=["d"]), summaries) == {}
    remark = cross_validate(cases, missing=[1], unfinished=[2], failed=["d", "e"]).remark
    assert remark == (
        "incomplete cross-validation: 2 of 3 folds; not trained: 1; training has not ended: 2; cases that failed: d, e"
    )


def test_the_cross_validated_table_is_in_every_report(config: Config) -> None:
    for fold in (0, 1):
        shutil.copytree(best_of(config, fold), experiment_of(config) / f"fold_{fold}" / LAST)
    report = evaluate.run(config)
    dice = {fold: [c.rows[0].values["dice"] for c in report.evaluation.cases if c.fold == fold] for fold in (0, 1)}
    sd = float(np.std([np.mean(dice[0]), np.mean(dice[1])], ddof=1))
    folds = json.loads((report.folder / "summary.json").read_text())["cross_validation"]
    assert (folds["folds"], folds["missing"], folds["unfinished"]) == ([0, 1], [], [])
    assert folds["classes"]["left"]["dice"]["sd"] == pytest.approx(sd)
    assert folds["classes"]["left"]["dice"]["by_fold"]["1"] == pytest.approx(np.mean(dice[1]))
    with (report.folder / "folds.csv").open(newline="") as file:
        (line,) = [line for line in csv.DictReader(file) if (line["class"], line["metric"]) == ("left", "dice")]
    assert float(line["fold_sd"]) == pytest.approx(sd, rel=1e-4)
    assert float(line["mean"]) == pytest.approx(np.mean([*dice[0], *dice[1]]), rel=1e-4)
    assert "Fold by fold" in (report.folder / "report.html").read_text()
    assert "Dice by fold" in report.as_text()
    assert "incomplete" not in report.as_text()


def test_incomplete_folds_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = known_experiment(tmp_path, monkeypatch, shifted_cases(), trained=(1,))
    report = evaluate.run(config)
    said = "incomplete cross-validation: 1 of 2 folds; not trained: 0; training has not ended: 1"
    assert said in report.as_text()
    assert said in (report.folder / "report.html").read_text()
    assert evaluate.run(str(best_of(config, 1))).evaluation.cross_validation is None
