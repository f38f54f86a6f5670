"""The configuration's sections, its JSON Schema, the YAMLs that come with medseg, and the one to start from."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.cli.loading import option_checks
from pipeline.config import (
    AugmentationSection,
    BudgetSection,
    Config,
    DataSection,
    EvaluationSection,
    PreprocessingSection,
    Section,
    TrainingSection,
)
from pipeline.config_loading import PRESETS, load_config, packaged
from pipeline.config_schema import expectation, json_schema, keys_named, schema_at, section_at
from pipeline.data.manifest import Case, ImageFile, Manifest, save_manifest
from pipeline.errors import ConfigError, ManifestError
from pipeline.stages import new_config, schema

REPOSITORY = Path(__file__).parents[1]
SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "data_manifests" / "lungs.json"
    case = Case(id="a", patient="a", images={"CT": ImageFile(path="a.nii.gz")}, fold=0)
    labels = {"background": 0, "left lung": 1, "right lung": 2}
    pairs = (("left lung", "right lung"),)
    dataset = Manifest(
        name="lungs", root=tmp_path, channels={"CT": "CT"}, labels=labels, label_pairs=pairs, cases=(case,)
    )
    save_manifest(dataset, path)
    return path


def sections(section: type[Section] = Config) -> list[type[Section]]:
    kinds = [field.annotation for field in section.model_fields.values()]
    below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
    return [section, *(deeper for kind in below for deeper in sections(kind))]


def test_a_budget_is_exactly_one_of_three() -> None:
    assert BudgetSection(epochs=3).epochs == 3
    for wrong in ({}, {"epochs": 3, "steps": 4}, {"epochs": 3, "minutes": 4.0, "steps": 5}):
        with pytest.raises(ValidationError, match="exactly one of steps, epochs, minutes"):
            BudgetSection.model_validate(wrong)


def test_what_is_compiled_is_not_recomputed() -> None:
    assert TrainingSection(compile=True).compile
    with pytest.raises(ValidationError, match="compile cannot take activation_checkpointing in"):
        TrainingSection(compile=True, activation_checkpointing=True)


@pytest.mark.parametrize("thresholds", [(), (0.5, 0.5), (0.5, 0.1)])
def test_thresholds_of_lesions_rise(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="each larger than the one before"):
        EvaluationSection(lesion_iou_thresholds=thresholds)


def test_what_is_not_said_of_lesions_or_the_viewer_leaves_the_digest_of_an_evaluation_as_it_was() -> None:
    assert EvaluationSection().model_dump(mode="json").keys() == {
        *("surface_tolerance_mm", "bootstrap_samples", "picture_cases")
    }
    assert len(EvaluationSection(lesions=("lesion",), smallest_lesion_mm3=3).model_dump()) == 5


@pytest.mark.parametrize("code", ["RAS", "LPS", "SAR", "ILP"])
def test_orientation_names_each_direction_once(code: str) -> None:
    assert PreprocessingSection(orientation=code).orientation == code


@pytest.mark.parametrize("code", ["", "RA", "RAL", "RRS", "ras", "RASL", "RLA", "XYZ"])
def test_a_wrong_orientation_is_refused(code: str) -> None:
    with pytest.raises(ValidationError, match="each pair once"):
        PreprocessingSection(orientation=code)


def test_ranges_ascend_and_factors_are_above_zero() -> None:
    assert AugmentationSection(scale=(0.5, 0.5)).scale == (0.5, 0.5)
    no_blur = {"blur_sigma_voxels": (0.0, 0.0)}
    for wrong in ({"scale": (1.2, 0.8)}, {"gamma": (0.0, 1.0)}, no_blur, {"noise_std": (0.2, 0.1)}):
        with pytest.raises(ValidationError):
            AugmentationSection.model_validate(wrong)
    assert AugmentationSection(noise_std=(0.0, 0.1)).noise_std == (0.0, 0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_is_finite(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        AugmentationSection(rotation_degrees=value, elastic_voxels=value)


def test_every_section_and_key_is_documented() -> None:
    assert len(sections()) == 11
    for section in sections():
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            kind = field.annotation
            assert field.description or (isinstance(kind, type) and issubclass(kind, Section)), (section, name)


def test_schema_describes_keys_and_extends() -> None:
    whole = json_schema()
    assert whole["$schema"].endswith("2020-12/schema")
    assert whole["properties"]["extends"]["description"]
    assert whole["$defs"]["TrainingSection"]["properties"]["foreground_fraction"]["description"].startswith("Share")
    assert whole["then"] == {"required": ["name", "data"], "properties": {"data": {"required": ["manifest"]}}}


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("training.learning_rate", "a number above 0 or null"),
        ("training.foreground_fraction", "a number from 0 to 1"),
        ("training.ema_decay", "a number of at least 0 and below 1 or null"),
        ("training.precision", "one of auto, fp32, bf16, fp16"),
        ("preprocessing.spacing_mm", "auto or a list of 3, each a number above 0"),
        ("preprocessing.normalisation", "a mapping, each value one of ct, zscore, zscore_nonzero, none"),
        ("inference.flip_axes", "a list, each one of x, y, z"),
        ("training.deep_supervision", "true or false"),
        ("data.manifest", "a path"),
        ("network.options", "a mapping"),
    ],
)
def test_expectation_in_words(key: str, words: str) -> None:
    found = schema_at(key.split("."))
    assert found is not None
    assert expectation(found) == words


def test_what_stands_at_a_path_of_keys() -> None:
    assert schema_at(("training", "nothing")) is None
    assert schema_at(("training", "learning_rate", "deeper")) is None
    assert section_at(("training", "budget")) is BudgetSection
    assert section_at(("training", "loss")) is None
    assert keys_named("batch_size") == ["preprocessing.batch_size", "training.batch_size"]


def test_the_schema_stage_writes_what_it_returns(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "schema.json"
    text = schema.run(out)
    assert json.loads(text) == json.loads(out.read_text()) == json_schema()
    assert schema.run() == text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_load_in_a_checkout_and_installed(path: Path, tmp_path: Path) -> None:
    assert packaged(path.name) == path
    # A wheel lays both folders into the package, side by side.
    installed = tmp_path / "site-packages" / "pipeline" / "configs" / path.name
    shutil.copytree(path.parent, installed.parent)
    config = load_config(path)
    assert config.name == path.stem
    moved = load_config(installed)
    init_from = config.training.init_from
    assert moved.changed(data=config.data, training=moved.training.changed(init_from=init_from)) == config
    here, there = config.data.manifest, moved.data.manifest
    assert here.relative_to(REPOSITORY) == there.relative_to(installed.parents[1])


def test_there_are_shipped_configurations() -> None:
    assert {"demo.yaml", "hippocampus_unet.yaml"} <= {path.name for path in SHIPPED}
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        packaged("nothing.yaml")


def test_a_new_configuration_loads_as_the_defaults(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "configs" / "my lungs.yaml"
    new_config.run(manifest, out)
    assert "manifest: ../data_manifests/lungs.json" in out.read_text()
    expected = Config(name="mylungs", data=DataSection(manifest=manifest), workspace=Path.cwd() / "work")
    assert load_config(out) == expected


def test_each_line_of_a_new_configuration_can_be_switched_on(manifest: Path, tmp_path: Path) -> None:
    out = new_config.run(manifest, tmp_path / "lungs.yaml")
    off = re.compile(r"^( *)#(\w+: )", re.MULTILINE)
    text = out.read_text()
    assert len(off.findall(text)) > 50
    # Of a budget one key may stand; all others may be switched on together.
    switched = re.sub(r"^ +(steps|minutes): .*\n", "", off.sub(r"\1\2", text), flags=re.MULTILINE)
    out.write_text(switched)
    config = load_config(out)
    assert config.preprocessing.normalisation == {"CT": "ct"}
    assert config.inference.largest_component == ("left lung", "right lung")


def test_a_new_configuration_replaces_nothing(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("name: mine\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: is there already"):
        new_config.run(manifest, out)
    assert out.read_text() == "name: mine\n"
    with pytest.raises(ManifestError, match="cannot be read"):
        new_config.run(tmp_path / "none.json", tmp_path / "other.yaml")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_extended_from_anywhere(preset: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"extends: preset:{preset}\nname: mine\ndata: {{manifest: m.json}}\nseed: 7\n")
    config = load_config(tmp_path / "mine.yaml", (), option_checks)
    assert (config.seed, config.data.manifest) == (7, tmp_path / "m.json")
    expected = {"fast": ("unet", "auto"), "standard": ("unet", 8), "large": ("residual_encoder_unet", 24)}
    assert (config.network.name, config.preprocessing.memory_gb) == expected[preset]
    assert config.training.ema_decay is not None
    assert len({path.stem for path in (REPOSITORY / "configs" / "presets").glob("*.yaml")} ^ set(PRESETS)) == 0


def test_an_unknown_preset_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nextends: preset:fats\ndata: {manifest: m.json}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:2:1: extends: no preset 'fats', did you mean 'fast'\?"):
        load_config(tmp_path / "mine.yaml")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_new_configuration_of_a_preset_loads_as_the_preset(preset: str, manifest: Path, tmp_path: Path) -> None:
    out = new_config.run(manifest, tmp_path / "lungs.yaml", preset)
    extending = tmp_path / "short.yaml"
    extending.write_text(f"extends: preset:{preset}\nname: lungs\ndata: {{manifest: {manifest}}}\n")
    assert load_config(out) == load_config(extending)
    # The lines that are switched off show the preset's values.
    off = re.compile(r"^( *)#(memory_gb|options|ema_decay|learning_rate): ", re.MULTILINE)
    out.write_text(off.sub(r"\1\2: ", out.read_text()))
    assert load_config(out) == load_config(extending)


def test_a_configuration_is_frozen() -> None:
    config: Any = Config(name="a", data=DataSection(manifest=Path("m.json")))
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "b"
