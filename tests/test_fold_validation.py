"""Scores of a validation in training, of a network whose every prediction is known."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_calibrating import box, predictor, stored

from pipeline.data.manifest import Case, ImageFile
from pipeline.data.store import CaseStore
from pipeline.predictor import Predictor
from pipeline.stages.fold.validation import DiceValidation

assert predictor  # a fixture

NOTHING = box(0)


def labelled(case: Case) -> Case:
    return case.changed(label=ImageFile(path="none"))


def test_a_structure_that_is_missed_or_invented_counts_nothing(tmp_path: Path, predictor: Predictor) -> None:
    store = CaseStore(tmp_path)
    cases = [stored(store, "right", box(4), box(4)), stored(store, "half", box(2), box(4))]
    cases += [stored(store, "invented", box(4), NOTHING), stored(store, "missed", NOTHING, box(4))]
    validation = DiceValidation(predictor, store)
    reached: list[str] = []
    scores = validation.scores([labelled(case) for case in cases], reached.append)
    assert scores == {"dice/left": pytest.approx((1 + 2 / 3) / 4), "score": pytest.approx((1 + 2 / 3) / 4)}
    assert reached == ["right", "half", "invented", "missed"]


def test_where_there_is_nothing_who_finds_nothing_is_right(tmp_path: Path, predictor: Predictor) -> None:
    store = CaseStore(tmp_path)
    validation = DiceValidation(predictor, store)
    empty = labelled(stored(store, "empty", NOTHING, NOTHING))
    invented = labelled(stored(store, "invented", box(4), NOTHING))
    assert validation.scores([empty]) == {"score": 1.0}
    assert validation.scores([invented])["score"] == 0.0
    # Where nobody has looked there is nothing to be right about.
    store.write("unseen", replace(store.read("empty"), label=None, reference=None), key="k")
    assert validation.scores([empty.changed(id="unseen", label=None)]) == {"score": 0.0}
