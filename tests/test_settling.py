"""The plans of a store: whose each is, and when it stays."""

import json
import re
from pathlib import Path

import pytest

from pipeline.config import Config, DataSection, NetworkSection, PreprocessingSection
from pipeline.data.phantoms import write_phantom_dataset
from pipeline.data.plan import Plan, read_plan
from pipeline.errors import ConfigError
from pipeline.stages import dry_run, plan, preprocess
from pipeline.stages import manifest as manifest_stage
from pipeline.stages.fold.identity import configuration_digest
from pipeline.stages.settling import plan_path
from pipeline.stages.train import fold_tasks
from pipeline.stages.workspace import Workspace


@pytest.fixture(scope="module")
def phantom_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    manifest_stage.run(write_phantom_dataset(folder / "set", cases=4), folder / "phantoms.json", folds=2)
    return folder / "phantoms.json"


@pytest.fixture
def narrow(phantom_set: Path, tmp_path: Path) -> Config:
    return Config(
        name="narrow",
        workspace=tmp_path / "work",
        data=DataSection(manifest=phantom_set),
        preprocessing=PreprocessingSection(patch_size=(16, 16, 16), batch_size=2),
        network=NetworkSection(options={"width": 4}),
    )


def wide(config: Config) -> Config:
    return config.changed(name="wide", network=config.network.changed(options={"width": 6}))


def with_memory(config: Config, memory_gb: float) -> Config:
    return config.changed(preprocessing=config.preprocessing.changed(memory_gb=memory_gb))


def width(made: Plan) -> int:
    assert made.network is not None
    return made.network.width


def path_of(config: Config) -> Path:
    return plan_path(Workspace(config.workspace).store(config, "phantoms"), config)


def edited(path: Path, pattern: str, value: str) -> None:
    text, count = re.subn(pattern, value, path.read_text(), flags=re.MULTILINE)
    assert count == 1
    path.write_text(text)


def test_memory_that_was_said_once_need_not_be_said_again(narrow: Config) -> None:
    said = with_memory(narrow, 8)
    made = preprocess.run(said)
    assert preprocess.run(narrow).plan == made.plan
    assert preprocess.run(narrow).folder == made.folder
    assert path_of(narrow) == path_of(said) == made.folder / "plan.yaml"
    assert dry_run.run(narrow).missing == ()
    assert configuration_digest(narrow) == configuration_digest(said)  # a training goes on without it
    often = said.changed(training=said.training.changed(checkpoint_minutes=0.5))
    assert configuration_digest(often) == configuration_digest(said)


def test_each_memory_has_a_plan_and_both_the_cases(narrow: Config) -> None:
    preprocess.run(narrow)
    larger = preprocess.run(with_memory(narrow, 24))
    assert not larger.written
    assert path_of(with_memory(narrow, 24)).parent == larger.folder / "plans"
    assert path_of(narrow) == larger.folder / "plan.yaml"
    # Of two other networks' plans, that without a memory takes what there is.
    preprocess.run(with_memory(wide(narrow), 24))
    assert path_of(wide(narrow)) == path_of(with_memory(wide(narrow), 24))


def test_which_of_several_memories_is_meant_is_not_guessed(narrow: Config, caplog: pytest.LogCaptureFixture) -> None:
    preprocess.run(with_memory(narrow, 8))
    larger = preprocess.run(with_memory(narrow, 24))
    with pytest.raises(ConfigError, match=r"plan\.yaml, 8 GB; .*-24gb\.yaml, 24 GB; say which"):
        path_of(narrow)
    with pytest.raises(ConfigError, match="there are plans for several"):
        dry_run.run(narrow)
    assert path_of(with_memory(narrow, 8)) == larger.folder / "plan.yaml"
    assert "plan.yaml: is for 8 GB; there is a plan for 24 GB too" in caplog.text
    # What this machine was planned for needs no memory said; that another was too is told.
    preprocess.run(wide(narrow), replan=True)
    preprocess.run(with_memory(wide(narrow), 24))
    assert path_of(wide(narrow)) != path_of(with_memory(wide(narrow), 24))
    assert not path_of(wide(narrow)).stem.endswith("gb")
    assert "is for the memory where it was made; there is a plan for 24 GB too" in caplog.text


def test_networks_that_share_cases_have_sizes_of_their_own(narrow: Config) -> None:
    first = preprocess.run(narrow)
    second = preprocess.run(wide(narrow))
    assert (width(first.plan), width(second.plan)) == (4, 6)
    assert second.folder == first.folder
    assert set(second.fresh) == set(first.written)
    assert read_plan(first.folder / "plan.yaml") == first.plan
    assert [width(fold_tasks(c, "0", "cpu")[0].plan) for c in (narrow, wide(narrow))] == [4, 6]
    # A network that was not planned for is trained by the plan there is.
    other = narrow.changed(network=NetworkSection(name="fcn", options={"width": 4}))
    assert fold_tasks(other, "0", "cpu")[0].plan.network == first.plan.network


def test_a_width_that_is_set_is_the_one_that_is_said(narrow: Config) -> None:
    text = " ".join(plan.run(narrow, device="cpu").as_text().split())
    assert "of 4 feature maps" in text
    assert "4 feature maps, set in the configuration" in text
    assert "32 feature maps" not in text


def test_an_edited_plan_of_a_network_is_kept_until_replan(narrow: Config) -> None:
    preprocess.run(narrow)
    preprocess.run(wide(narrow))
    edited(path_of(wide(narrow)), "^batch_size: 2", "batch_size: 3")
    assert preprocess.run(wide(narrow)).plan.batch_size == 3
    assert preprocess.run(narrow).plan.batch_size == 2
    assert preprocess.run(wide(narrow), replan=True).plan.batch_size == 2
    edited(path_of(wide(narrow)), "^crop: nonzero", "crop: none")
    with pytest.raises(ConfigError, match=r"only patch_size.*--replan"):
        preprocess.run(wide(narrow))


def test_how_images_are_treated_is_edited_in_one_place(narrow: Config) -> None:
    first = preprocess.run(narrow)
    preprocess.run(wide(narrow))
    edited(first.folder / "plan.yaml", "^crop: nonzero", "crop: none")
    assert preprocess.run(wide(narrow)).plan.crop == "none"
    assert preprocess.run(narrow).plan.crop == "none"
    assert preprocess.run(narrow, replan=True).plan.crop == "nonzero"
    assert preprocess.run(wide(narrow)).plan.crop == "nonzero"


def test_plans_of_other_facts_are_made_anew(narrow: Config) -> None:
    folder = preprocess.run(narrow).folder
    preprocess.run(wide(narrow))
    for path in (folder / "plan.yaml", path_of(wide(narrow))):
        record = path.with_suffix(".record.json")
        record.write_text(json.dumps({**json.loads(record.read_text()), "facts": "other"}))
    # Whoever comes first has plan.yaml, the other a plan of its own.
    assert width(preprocess.run(wide(narrow)).plan) == 6
    assert width(preprocess.run(narrow).plan) == 4
    assert path_of(wide(narrow)) == folder / "plan.yaml"
    assert (width(read_plan(path_of(narrow))), path_of(narrow).parent) == (4, folder / "plans")


def test_a_plan_of_before_is_every_networks(narrow: Config) -> None:
    first = preprocess.run(narrow)
    (first.folder / "plan.record.json").unlink()
    (first.folder / "plan.sha256").write_text(first.plan.digest() + "\n")
    assert preprocess.run(wide(narrow)).plan == first.plan
    assert path_of(wide(narrow)) == first.folder / "plan.yaml"
