"""The model card: what it says, where from, and what it leaves alone."""

from pathlib import Path

import pytest
import torch
from phantom_experiments import preprocessed
from tiny_models import make_model, make_plan

from pipeline.data.manifest import Case, ImageFile, Manifest, load_manifest
from pipeline.errors import ModelError
from pipeline.inference.postprocessing import Postprocessing, save_postprocessing
from pipeline.model import load_model, model_digest, save_model, weights_sha256
from pipeline.stages import evaluate, train
from pipeline.stages.model_card import DataFacts, Evaluated, Score, card_of, keep_evaluation, read_facts, write_card


def manifest_of(tmp_path: Path) -> Manifest:
    """Four cases of three patients, their names to be found nowhere."""
    cases = tuple(
        Case(
            id=f"SECRET_{n}",
            patient=f"MUELLER_{min(n, 2)}",
            images={"T1": ImageFile(path=f"{n}.nii.gz")},
            label=ImageFile(path=f"{n}_label.nii.gz"),
            fold=n % 2,
            annotated_classes=("left", "right") if n == 1 else None,
        )
        for n in range(4)
    )
    return Manifest(
        name="phantoms",
        description="synthetic heads",
        licence="CC0",
        source="made here",
        root=tmp_path,
        channels={"T1": "MR"},
        labels={"background": 0, "left": 1, "right": 7},
        cases=cases,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "best", make_model())
    return tmp_path / "best"


def test_facts_are_counted_by_hand_and_name_nobody(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    facts = DataFacts.of(manifest, manifest.training_cases(0), manifest.validation_cases(0))
    # Cases 1 and 3 are learned from, of patients 1 and 2; of case 1 it is said what was looked for.
    assert (facts.training_cases, facts.training_patients) == (2, 2)
    assert (facts.validation_cases, facts.validation_patients) == (2, 2)
    assert (facts.partly_annotated_cases, facts.incomplete_cases) == (1, 0)
    assert "SECRET" not in facts.model_dump_json()
    assert "MUELLER" not in facts.model_dump_json()


def test_a_card_says_where_the_model_is_from_and_where_it_ends(folder: Path, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    write_card(folder, DataFacts.of(manifest, manifest.training_cases(0), manifest.validation_cases(0)))
    card = (folder / "MODEL_CARD.md").read_text()
    for said in (
        "# tiny, fold 2 held out",
        "not a medical device",
        "0 background, 1 left, 7 right",
        "licence: CC0",
        "source: made here",
        "learned from 2 cases of 2 patients",
        "unet (width 4, levels 2, norm batch), 3-D",
        "300 optimiser steps",
        f"SHA-256 {weights_sha256(folder / 'weights.safetensors')}",
        "| dice/left | 0.8750 |",
        "Means over 2 validation cases of fold 2",
        "| left | 1 | 8 | 0.2, 0.1 to 0.3 |",
        "Has seen no voxels outside 0.9x0.9x0.9 to 1.2x1.2x1.2 mm",
        "2 patients are few",
    ):
        assert said in card, said
    assert "SECRET" not in card


def test_a_card_is_made_anew_from_the_folder_alone(folder: Path, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    write_card(folder, DataFacts.of(manifest, manifest.cases, ()))
    first = card_of(folder)
    assert "## Postprocessing\n\n- none\n" in first
    rules = Postprocessing(largest_component=("left",), smallest_volume_ml={"right": 0.25}, chosen_on="8 cases")
    save_postprocessing(folder, rules)
    assert "- largest component of left, right in pieces of at least 0.25 ml, chosen on 8 cases\n" in card_of(folder)
    assert read_facts(folder) == DataFacts.of(manifest, manifest.cases, ())


def test_scores_with_their_intervals_replace_earlier_ones_of_the_same_cases(folder: Path) -> None:
    before = model_digest(folder)
    for cases, mean in (("fold", 0.5), ("test", 0.75), ("fold", 0.875)):
        score = Score(structure="left", metric="dice", mean=mean, low=mean - 0.0625, high=None, cases=7)
        keep_evaluation(folder, Evaluated(cases=cases, number=8, scores=(score,)))
    card = (folder / "MODEL_CARD.md").read_text()
    assert card.count("By `medseg evaluate --cases fold`, on 8 cases:") == 1
    assert "| left | dice | 0.875 | 0.8125 to not known | 7 |" in card
    assert "| left | dice | 0.75 | 0.6875 to not known | 7 |" in card
    assert "| left | dice | 0.5 |" not in card
    assert model_digest(folder) == before


def test_a_card_changes_nothing_of_the_model(folder: Path) -> None:
    before = model_digest(folder)
    write_card(folder)
    assert model_digest(folder) == before
    assert load_model(folder, torch.device("cpu")).description == make_model().description


def test_of_a_model_without_facts_it_says_that_they_are_not_known(folder: Path) -> None:
    write_card(folder)
    assert "description, licence, source, number of patients: not known" in (folder / "MODEL_CARD.md").read_text()
    (folder / "data.json").write_text("{}")
    with pytest.raises(ModelError, match=r"data\.json: is damaged"):
        card_of(folder)


def test_regions_and_two_channels_are_named(tmp_path: Path) -> None:
    plan = make_plan(
        channels={"T1": "MR", "CT": "CT"},
        normalisation={},
        regions={"whole": ("left", "right"), "core": ("right",)},
        label_pairs=(),
    )
    save_model(tmp_path / "best", make_model(plan=plan, output="regions"))
    card = card_of(tmp_path / "best")
    assert "Marks whole, core in 3D images of T1 (MR), CT (CT)" in card
    assert "Has seen MR, CT (T1, CT) and no other" in card


@pytest.mark.slow
def test_training_writes_it_beside_each_model(tmp_path: Path) -> None:
    settings = (
        "preprocessing.patch_size=[16, 16, 16]",
        "network.options={width: 4, levels: 2, norm: batch}",
        "training.budget.steps=1",
    )
    config = preprocessed(tmp_path, settings, cases=4, folds=2)
    (run,) = train.run(config)
    manifest = load_manifest(config.data.manifest)
    seen = manifest.training_cases(0)
    counted = f"learned from {len(seen)} cases of {len({case.patient for case in seen})} patients"
    for name in ("best", "last"):
        card = (run / "models" / name / "MODEL_CARD.md").read_text()
        assert counted in card
        assert "1 optimiser steps, of a budget of 1 steps" in card
        assert "licence: CC0" in card
        assert not any(case.id in card or case.patient in card for case in manifest.cases)
    evaluate.run(str(run), workspace=config.workspace)
    card = (run / "models" / "best" / "MODEL_CARD.md").read_text()
    assert "By `medseg evaluate --cases fold`, on 2 cases:\n\n| structure | metric | mean |" in card
    assert not any(case.id in card or case.patient in card for case in manifest.cases)
