"""`medseg find-best` on experiments whose predictions are known: which rules it chooses, and which configuration."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from known_predictions import best_of, experiment_of, known_experiment, littered_cases, shifted_cases
from test_comparison import member, scored
from test_evaluate import NATIVE, VALUES, structures
from tiny_models import make_plan

from pipeline.config import Config, InferenceSection
from pipeline.errors import EvaluationError, ModelError
from pipeline.evaluation.comparison.comparing import compare
from pipeline.evaluation.metrics import score_case
from pipeline.evaluation.statistics import MEAN
from pipeline.evaluation.structures import Structures
from pipeline.inference.postprocessing import (
    POSTPROCESSING,
    Postprocessing,
    common_rules,
    postprocess,
    read_postprocessing,
    save_postprocessing,
    with_rules,
)
from pipeline.stages import evaluate, find_best, segment
from pipeline.stages.find_best import verdict_of
from pipeline.stages.member_runs import read_run
from pipeline.stages.models import LAST
from pipeline.stages.postprocessing.rules import Pieces, Rule, candidates, pieces_of
from pipeline.volumes.volume import read_label

PLAN = make_plan()


def finished(config: Config, folds: int) -> Config:
    """Let the trainings of an experiment have ended."""
    for fold in range(folds):
        shutil.copytree(best_of(config, fold), experiment_of(config) / f"fold_{fold}" / LAST)
    return config


@pytest.fixture
def littered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """An experiment of three folds whose every case has crumbs beside the left structure."""
    return finished(known_experiment(tmp_path, monkeypatch, littered_cases()), 3)


@pytest.mark.parametrize("rule", [Rule(), Rule(largest_only=True), Rule(smallest_ml=0.004), Rule(smallest_ml=0.02)])
@pytest.mark.parametrize("ignored", [False, True])
def test_the_dice_of_pieces_is_that_of_the_postprocessed_label_map(rule: Rule, ignored: bool) -> None:
    plan = make_plan(ignore_label=9) if ignored else PLAN
    rng = np.random.default_rng(3)
    for _ in range(5):
        reference = rng.choice(3, NATIVE.shape, p=[0.9, 0.08, 0.02]).astype(np.uint8)
        prediction = np.where(rng.random(NATIVE.shape) < 0.5, reference, 0).astype(np.uint8)
        if ignored:
            reference[:, :4] = plan.ignored_class
        found = pieces_of(prediction, reference, plan, NATIVE.voxel_volume_ml)
        rules = Postprocessing(
            largest_component=("left", "right") if rule.largest_only else (),
            smallest_volume_ml=dict.fromkeys(["left", "right"], rule.smallest_ml) if rule.smallest_ml else {},
        )
        treated = postprocess(prediction, plan, NATIVE, rules)
        rows = score_case(treated, reference, NATIVE.spacing_mm, Structures.of_labels(plan), 1.0, metrics=["dice"])
        for row in rows:
            expected = row.values["dice"] if row.status == "scored" else 0.0
            assert found[row.class_name].dice(rule) == pytest.approx(expected)


def test_what_is_rightly_not_there_counts_one_and_what_never_was_nothing() -> None:
    crumb = Pieces(np.array([0.01]), np.array([4]), np.array([0]), reference=0)
    assert (crumb.dice(Rule()), crumb.dice(Rule(smallest_ml=0.02))) == (0.0, 1.0)
    nothing = Pieces(np.zeros(0), np.zeros(0, int), np.zeros(0, int), reference=0)
    assert np.isnan(nothing.dice(Rule()))
    assert replace(nothing, reference=5).dice(Rule(largest_only=True)) == 0.0


@pytest.mark.slow
def test_rules_that_help_are_chosen_and_ship(littered: Config, tmp_path: Path) -> None:
    before = evaluate.run(littered).evaluation
    report = find_best.run([littered])
    found = report.postprocessing
    assert found is not None
    (left, right) = found.labels
    assert (left.chosen, right.chosen) == (Rule(largest_only=True), None)
    raw = np.mean([case.rows[0].values["dice"] for case in before.cases])
    assert left.choice.untreated == pytest.approx(raw)
    assert left.choice.cross_fitted.mean == pytest.approx(1 - raw)
    evidence = json.loads((experiment_of(littered) / POSTPROCESSING).read_text())
    assert evidence["largest_component"] == ["left"]
    assert evidence["labels"]["left"]["chosen_by_the_other_folds"] == dict.fromkeys("012", "largest component")
    assert evidence["labels"]["left"]["tried"][0]["better"] == 12
    assert report.command.startswith(f"medseg segment INPUT... --model {experiment_of(littered)}")
    # It is what evaluate scores and segment writes, one fold or all, and what says so.
    after = evaluate.run(littered).evaluation
    assert {case.rows[0].values["dice"] for case in after.cases} == {1.0}
    assert "largest component of left, chosen on" in after.facts["postprocessing"]
    image = littered.data.manifest.parent / "images" / "x00_T1.nii.gz"
    for models in ([str(experiment_of(littered))], [str(best_of(littered, 1))]):
        done = segment.run(models, [image], tmp_path / "out")
        np.testing.assert_array_equal(read_label(tmp_path / "out" / "x00_T1.nii.gz").array, VALUES[structures(0)])
        assert done.as_json()["postprocessing"]["largest_component"] == ["left"]
        assert "postprocessing: largest component of left" in done.as_text()
    # Found again from what is kept: the rules in force have no part in it.
    again = find_best.run([littered]).postprocessing
    assert again is not None
    assert again.rules == found.rules


def test_segment_does_cases_again_once_rules_are_chosen(littered: Config, tmp_path: Path) -> None:
    image = littered.data.manifest.parent / "images" / "x00_T1.nii.gz"
    model = str(best_of(littered, 0))
    statuses = [segment.run(model, [image], tmp_path / "out").results[0].status for _ in range(2)]
    save_postprocessing(best_of(littered, 0), Postprocessing(largest_component=("left",)))
    statuses.append(segment.run(model, [image], tmp_path / "out").results[0].status)
    assert statuses == ["done", "skipped", "done"]


@pytest.mark.slow
def test_rules_that_do_not_help_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = finished(known_experiment(tmp_path, monkeypatch, shifted_cases()), 2)
    report = find_best.run([config])
    assert report.postprocessing is not None
    assert report.postprocessing.rules.as_text() == "none"
    assert not (best_of(config, 0) / POSTPROCESSING).exists()
    save_postprocessing(best_of(config, 0), Postprocessing(largest_component=("right",), chosen_on="before"))
    find_best.run([config])
    assert not read_postprocessing(best_of(config, 0)).has_rules
    assert (best_of(config, 0) / POSTPROCESSING).exists()  # what MLflow has of it is overwritten
    without = find_best.run([config], postprocessing=False)
    assert without.postprocessing is None


def test_a_training_that_has_not_ended_and_a_single_fold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = known_experiment(tmp_path, monkeypatch, shifted_cases(), trained=(1,))
    with pytest.raises(ModelError, match="not finished"):
        find_best.run([config])
    shutil.copytree(best_of(config, 1), experiment_of(config) / "fold_1" / LAST)
    with pytest.raises(EvaluationError, match="two or more folds, there are those of 1"):
        find_best.run([config])


def test_rules_of_an_ensemble_are_those_that_all_have(tmp_path: Path) -> None:
    first = Postprocessing(
        largest_component=("left", "right"), smallest_volume_ml={"left": 0.3, "right": 0.2}, chosen_on="a"
    )
    second = Postprocessing(largest_component=("right",), smallest_volume_ml={"left": 0.1}, chosen_on="b")
    for name, rules in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        save_postprocessing(tmp_path / name, rules)
    (tmp_path / "bare").mkdir()
    both = common_rules([tmp_path / "a", tmp_path / "b"])
    assert (both.largest_component, both.smallest_volume_ml) == (("right",), {"left": 0.1})
    assert both.chosen_on == "a; b"
    assert not common_rules([tmp_path / "a", tmp_path / "bare"]).has_rules
    (tmp_path / "a" / POSTPROCESSING).write_text("[]")
    with pytest.raises(ModelError, match="find-best"):
        common_rules([tmp_path / "a"])


def test_chosen_rules_stand_beside_those_of_the_configuration() -> None:
    own = InferenceSection(largest_component=("right",), smallest_volume_ml={"left": 0.2, "right": 0.1}, overlap=0.25)
    chosen = Postprocessing(largest_component=("right", "left"), smallest_volume_ml={"left": 0.1, "right": 0.3})
    both = with_rules(own, chosen)
    assert both.largest_component == ("right", "left")
    assert both.smallest_volume_ml == {"left": 0.2, "right": 0.3}
    assert both.overlap == 0.25
    classes = np.random.default_rng(0).choice(3, NATIVE.shape, p=[0.8, 0.1, 0.1]).astype(np.uint8)
    one_by_one = postprocess(postprocess(classes, PLAN, NATIVE, own), PLAN, NATIVE, chosen)
    np.testing.assert_array_equal(postprocess(classes, PLAN, NATIVE, both), one_by_one)


def test_thresholds_lie_just_above_volumes_that_were_predicted() -> None:
    one = Pieces(np.array([5.0, 0.0101, 0.2]), np.zeros(3, int), np.zeros(3, int), 1)
    other = Pieces(np.array([7.0]), np.zeros(1, int), np.zeros(1, int), 1)
    rules = candidates([one, other])
    assert rules[0] == Rule(largest_only=True)
    assert [rule.smallest_ml for rule in rules[1:]] == pytest.approx([0.0102, 0.201])
    # Where every prediction is of one piece there is no largest to choose.
    assert candidates([other]) == [Rule(smallest_ml=7.01)]
    rounded = Pieces(np.array([0.01 * (1 - 3e-8)]), np.zeros(1, int), np.zeros(1, int), 1)
    assert candidates([rounded]) == [Rule(smallest_ml=0.0101)]
    assert candidates([]) == []


@pytest.mark.slow
def test_a_fold_is_read_by_its_newest_evaluation(littered: Config) -> None:
    run = experiment_of(littered) / "fold_0"
    wider = littered.changed(evaluation=littered.evaluation.changed(surface_tolerance_mm=3.0))
    evaluations: list[tuple[str | Config, float]] = [(str(best_of(littered, 0)), 0.5), (wider, 3.0)]
    for target, tolerance_mm in [*evaluations, evaluations[0]]:
        evaluate.run(target)
        assert read_run(run, "fold").tolerance_mm == tolerance_mm


DICE = [0.80 + 0.01 * number for number in range(8)]


def test_the_best_is_recommended_where_the_test_tells_it_from_the_others() -> None:
    good = member("good", *(scored(str(n), d, d, seconds=9.0) for n, d in enumerate(DICE)))
    bad = member("bad", *(scored(str(n), d - 0.05, d - 0.05, seconds=1.0) for n, d in enumerate(DICE)))
    verdict = verdict_of(compare("two", [bad, good], samples=50))
    assert (verdict.best, verdict.recommended, verdict.level) == ("good", "good", ("good",))
    assert verdict.reason.startswith("good has the best mean Dice, 0.8350; against it bad -0.0500 [-0.0500, -0.0500]")


def test_of_few_patients_a_clear_difference_is_no_noise() -> None:
    # Of five patients the smallest p of a signed-rank test is 0.06.
    good = member("good", *(scored(str(n), d, d, seconds=9.0) for n, d in enumerate(DICE[:5])))
    bad = member("bad", *(scored(str(n), d - 0.3, d - 0.3, seconds=1.0) for n, d in enumerate(DICE[:5])))
    verdict = verdict_of(compare("two", [bad, good], samples=50))
    assert (verdict.recommended, verdict.level) == ("good", ("good",))
    assert "5 patients are too few for the test to tell any from another. Use good" in verdict.reason


def test_an_uncorrected_interval_does_not_make_noise_a_difference() -> None:
    # Worse in one patient of ten, by the fifth of the differences: p is 0.02, of one pair of ten.
    gains = [0.010, 0.011, 0.012, 0.013, -0.0135, 0.014, 0.015, 0.016, 0.017, 0.018]
    dear = member("dear", *(scored(str(n), 0.8 + g, 0.8, seconds=9.0) for n, g in enumerate(gains)))
    others = [member(f"other{k}", *(scored(str(n), 0.8, 0.8, seconds=k + 1) for n in range(10))) for k in range(4)]
    result = compare("five", [dear, *others], samples=200)
    pairs = [pair for pair in result.pairs if (pair.metric, pair.class_name) == ("dice", MEAN)]
    (pair,) = [pair for pair in pairs if (pair.first, pair.second) == ("dear", "other0")]
    assert pair.p < 0.05 < pair.p_holm
    assert pair.difference.low > 0
    verdict = verdict_of(result)
    assert (verdict.best, verdict.recommended) == ("dear", "other0")


def test_within_noise_the_cheaper_is_recommended() -> None:
    dear = member("dear", *(scored(str(n), d, d, seconds=9.0) for n, d in enumerate(DICE)))
    wobbly = [scored(str(n), d + 0.01 * (-1) ** n - 0.001, d, seconds=1.0) for n, d in enumerate(DICE)]
    verdict = verdict_of(compare("two", [dear, member("cheap", *wobbly)], samples=50))
    assert (verdict.best, verdict.recommended, verdict.level) == ("dear", "cheap", ("dear", "cheap"))
    assert "within noise, and that is cheaper (1 against 9 s a case). Use cheap" in verdict.reason
    # Seconds of different devices say nothing: parameters do.
    elsewhere = member("cheap", *wobbly, device="gpu", parameters=9999)
    verdict = verdict_of(compare("two", [dear, elsewhere], samples=50))
    assert (verdict.best, verdict.recommended) == ("dear", "dear")
    assert "cheap cannot be told from it, and cost no less" in verdict.reason


def copy_of(littered: Config) -> Config:
    """Copy an experiment under another name."""
    other = littered.changed(name="other")
    shutil.copytree(experiment_of(littered), experiment_of(other))
    for path in experiment_of(other).rglob("*.yaml"):
        path.write_text(path.read_text().replace("name: tiny", "name: other"))
    return other


@pytest.mark.slow
def test_a_case_that_failed_once_does_not_refuse_for_ever(littered: Config) -> None:
    folder = evaluate.run(str(best_of(littered, 0))).folder
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "failures": {"x00": "cut short"}}))
    report = find_best.run([littered, copy_of(littered)], postprocessing=False)
    assert report.comparison is not None
    assert report.comparison.patients == 12


@pytest.mark.slow
def test_configurations_are_compared_on_what_is_kept(littered: Config) -> None:
    other = copy_of(littered)
    report = find_best.run([littered, other])
    assert report.comparison is not None
    assert set(report.verdict.level) == {"tiny", "other"}
    folder = littered.workspace / "comparisons" / "find_best_tiny_vs_other"
    assert report.folder == folder.resolve()
    said = json.loads((folder / "find_best.json").read_text())
    assert said["recommended"] == report.verdict.recommended
    assert report.verdict.reason in (folder / "comparison.md").read_text()
    assert f"use: {report.command}" in report.as_text()
    # Rules were chosen for the recommended one alone, and are no part of the comparison.
    rules = {
        name: read_postprocessing(best_of(one, 0)).has_rules for name, one in (("tiny", littered), ("other", other))
    }
    assert rules == {name: name == report.verdict.recommended for name in rules}
    again = find_best.run([littered, other])
    assert again.comparison is not None
    assert again.comparison.estimates == report.comparison.estimates
