"""Reading a configuration: what extends what, whose path it is, and that each error names its line."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Config, DataSection, NetworkSection
from pipeline.config_loading import OptionChecks, as_sections, dump_config, load_config
from pipeline.errors import ConfigError
from pipeline.networks import check_options as check_network
from pipeline.training.losses import check_options as check_loss
from pipeline.training.optimisation import check_optimiser, check_schedule

Write = Callable[..., Path]

MINIMAL = "name: a\ndata: {manifest: m.json}\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(text: str, name: str = "x.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return _write


def errors(path: Path, *overrides: str, option_checks: Callable[[], OptionChecks] | None = None) -> list[str]:
    """Return the lines of the error, with the folder taken off."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, option_checks)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def tables() -> OptionChecks:
    return {
        "network.name": check_network,
        "training.loss": check_loss,
        "training.optimiser": check_optimiser,
        "training.schedule": check_schedule,
    }


def test_every_error_at_once_with_its_place(write: Write) -> None:
    path = write(
        """name: a b
nework: {name: unet}
data:
  manifest: m.json
training:
  learning_rat: 1
  learning_rate: abc
  precision: fp23
  budget: {epochs: 3, minutes: 4}
  augmentation:
    scale: [1.2, 0.8]
    gamma: [1]
preprocessing:
  patch_size: [40, abc, 40]
  normalisation: {MR: zscor}
inference:
  warmup_fraction: 0.1
  overlap: true
"""
    )
    assert errors(path, "seed=-1", "evaluation.zzz=3", "nothing") == [
        "--set evaluation.zzz=3: evaluation.zzz: unknown key, expected one of surface_tolerance_mm, bootstrap_samples, "
        "picture_cases, lesions, lesion_iou_thresholds, lesion_connectivity, smallest_lesion_mm3, viewer, viewer_mb",
        "--set nothing: expected SECTION.KEY=VALUE",
        "--set seed=-1: seed: expected a whole number of at least 0, got -1",
        "x.yaml:1:1: name: expected text that matches ^[A-Za-z0-9][A-Za-z0-9_.-]*$, got 'a b'",
        "x.yaml:2:1: nework: unknown key, did you mean 'network'?",
        "x.yaml:6:3: training.learning_rat: unknown key, did you mean 'learning_rate'?",
        "x.yaml:7:3: training.learning_rate: expected a number above 0 or null, got 'abc'",
        "x.yaml:8:3: training.precision: expected one of auto, fp32, bf16, fp16, got 'fp23', did you mean 'fp32'?",
        "x.yaml:9:3: training.budget: give exactly one of steps, epochs, minutes",
        "x.yaml:11:5: training.augmentation.scale: expected the smaller number first, got [1.2, 0.8]",
        "x.yaml:12:5: training.augmentation.gamma: expected a list of 2, each a number above 0, got [1]",
        "x.yaml:14:3: preprocessing.patch_size: expected auto or a list of 3, each a whole number of at least 1, "
        "got [40, 'abc', 40]",
        "x.yaml:15:19: preprocessing.normalisation.MR: expected one of ct, zscore, zscore_nonzero, none, got 'zscor', "
        "did you mean 'zscore'?",
        "x.yaml:17:3: inference.warmup_fraction: unknown key, did you mean 'training.warmup_fraction'?",
        "x.yaml:18:3: inference.overlap: expected a number of at least 0 and below 1, got true",
    ]


def test_what_is_missing_is_named_where_it_should_stand(write: Write) -> None:
    assert errors(write("seed: 3\ndata:\n  root: .\n")) == [
        "x.yaml:1:1: name: is missing, expected text that matches ^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        "x.yaml:2:1: data.manifest: is missing, expected a path",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"x\.yaml: is empty"),
        ("# only a comment\n", r"x\.yaml: is empty"),
        ("- a\n- b\n", r"x\.yaml:1:1: expected a mapping"),
        ("just text\n", r"x\.yaml:1:1: expected a mapping of sections, got 'just text'"),
        ("name: a\ndata: {manifest\n", r"x\.yaml:3:1: broken YAML: "),
        ("name: a\n\tseed: 3\n", r"x\.yaml:2:1: broken YAML: found character '\\t'"),
        ("name: a\n---\nname: b\n", r"x\.yaml:2:1: broken YAML: but found another document"),
        ("name: \x01\n", r"x\.yaml: broken YAML: special characters are not allowed"),
    ],
)
def test_a_file_that_is_no_configuration(write: Write, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(text))
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: is not UTF-8 text"):
        load_config(tmp_path / "latin.yaml")


def test_a_key_that_occurs_twice(write: Write) -> None:
    assert errors(write(MINIMAL + "training:\n  loss: dice_ce\n  loss: cross_entropy\n")) == [
        "x.yaml:5:3: training.loss: the key occurs twice, first at x.yaml:4:3"
    ]


def test_no_tag_runs_code_and_no_alias_multiplies(write: Write, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    text = f"""name: a
data: &data {{manifest: m.json}}
workspace: !!python/object/apply:pathlib.Path.touch [{target}]
seed: !!int three
network: {{options: *data}}
evaluation: &own {{bootstrap_samples: *own}}
"""
    assert errors(write(text)) == [
        "x.yaml:3:1: workspace: the YAML tag !!python/object/apply:pathlib.Path.touch is not taken",
        "x.yaml:4:1: seed: 'three' is no int",
        "x.yaml:5:11: network.options: YAML aliases (*name) are not taken; write the value out, or use `extends`",
        "x.yaml:6:19: evaluation.bootstrap_samples: YAML aliases (*name) are not taken; write the value out, or use "
        "`extends`",
    ]
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), (".5", 0.5), ("3", 3.0), ("+2.5e1", 25.0), ("0.003", 0.003)],
)
def test_a_number_is_read_as_people_write_it(write: Write, text: str, value: float) -> None:
    assert load_config(write(MINIMAL + f"training: {{learning_rate: {text}}}\n")).training.learning_rate == value
    assert load_config(write(MINIMAL), [f"training.learning_rate={text}"]).training.learning_rate == value


@pytest.mark.parametrize("text", ["'3'", "true", "1:30", "2024-01-01", ".inf", ".nan", "-1", "[3]", "null", "1_000"])
def test_what_only_looks_like_a_number_is_refused(write: Write, text: str) -> None:
    # YAML 1.1 reads 1:30 as 90, and pydantic's lax mode true as 1.
    (line,) = errors(write(MINIMAL + f"training: {{checkpoint_minutes: {text}}}\n"))
    assert line.startswith("x.yaml:3:12: training.checkpoint_minutes: expected a number above 0, got ")


def test_a_count_in_powers_of_ten(write: Write) -> None:
    assert load_config(write(MINIMAL), ["training.budget.steps=1e4"]).training.budget.steps == 10000
    assert errors(write(MINIMAL), "training.budget.steps=3.0") == [
        "--set training.budget.steps=3.0: training.budget.steps: expected a whole number of at least 1 or null, got 3.0"
    ]


def test_text_stays_text(write: Write) -> None:
    # YAML 1.1 reads these as false, 8 and a date.
    for text in ("no", "on", "2024-01-01", "0o10"):
        assert load_config(write(f"name: {text}\ndata: {{manifest: m.json}}\n")).name == text


def test_extends_merges_mappings_and_replaces_the_rest(write: Write) -> None:
    write(
        """name: base
data: {manifest: ../m.json}
preprocessing: {patch_size: [40, 40, 40], normalisation: {T1: zscore, T2: none}}
training: {learning_rate: 1, weight_decay: 1, budget: {minutes: 10}}
inference: {largest_component: [a, b]}
""",
        "bases/base.yaml",
    )
    path = write(
        """extends: bases/base.yaml
name: child
preprocessing: {patch_size: [8, 8, 8], normalisation: {T2: ct}}
training: {weight_decay: 2, budget: {epochs: 3}}
inference: {largest_component: [c]}
evaluation:
  # a section of which every line is commented out
"""
    )
    config = load_config(path)
    assert config.name == "child"
    assert config.data.manifest == path.parent / "m.json"
    assert config.preprocessing.patch_size == (8, 8, 8)
    assert config.preprocessing.normalisation == {"T1": "zscore", "T2": "ct"}
    assert (config.training.learning_rate, config.training.weight_decay) == (1, 2)
    assert (config.training.budget.minutes, config.training.budget.epochs) == (None, 3)
    assert config.inference.largest_component == ("c",)


def test_later_extended_files_win_and_the_own_wins_most(write: Write) -> None:
    write(MINIMAL + "seed: 1\nworkspace: /one\ntracking: {alias: one}\n", "one.yaml")
    write("seed: 2\nworkspace: /two\n", "two.yaml")
    config = load_config(write("extends: [one.yaml, two.yaml]\nseed: 3\n"))
    assert (config.seed, config.workspace, config.tracking.alias) == (3, Path("/two"), "one")
    swapped = load_config(write("extends: [two.yaml, one.yaml]\n"))
    assert (swapped.seed, swapped.workspace) == (1, Path("/one"))


def test_options_go_with_the_network_or_loss_that_they_belong_to(write: Write) -> None:
    write(
        MINIMAL + "network: {options: {width: 8}}\ntraining: {loss: cross_entropy, loss_options: {a: 1}}\n", "base.yaml"
    )
    same = load_config(write("extends: base.yaml\nnetwork: {name: unet, options: {levels: 3}}\n"))
    assert same.network.options == {"width": 8, "levels": 3}
    other = load_config(write("extends: base.yaml\nnetwork: {name: segresnet, options: {blocks_up: [1]}}\n"))
    assert other.network.options == {"blocks_up": [1]}
    assert other.training.loss_options == {"a": 1}
    assert load_config(write("extends: base.yaml\ntraining: {loss: dice_ce}\n")).training.loss_options == {}
    assert load_config(write("extends: base.yaml\n"), ["network.name=segresnet"]).network.options == {}


def test_options_that_an_override_says_are_of_what_another_names(write: Write) -> None:
    path = write(MINIMAL + "network: {options: {width: 8}}\n")
    overrides = ["network.options.blocks_up=[1]", "network.name=segresnet"]
    for order in (overrides, overrides[::-1]):
        assert load_config(path, order).network == NetworkSection(name="segresnet", options={"blocks_up": [1]})


def test_overrides_as_a_yaml_would_say_them() -> None:
    settings = {
        "network.options.width": 4,
        "network.name": "dynunet",
        "network.options": {"levels": 3},
        "training.budget.steps": 3,
        "training.budget.minutes": 1,
        "seed": 2,
    }
    assert as_sections(settings) == {
        "network": {"options": {"width": 4, "levels": 3}, "name": "dynunet"},
        "training": {"budget": {"minutes": 1}},
        "seed": 2,
    }


def test_an_empty_section_changes_nothing_and_null_drops_options(write: Write) -> None:
    write(MINIMAL + "training: {learning_rate: 1}\nnetwork: {options: {width: 8}}\n", "base.yaml")
    assert load_config(write("extends: base.yaml\ntraining:\n")).training.learning_rate == 1
    assert load_config(write("extends: base.yaml\nnetwork: {options: {levels: 3}}\n")).network.options == {
        "width": 8,
        "levels": 3,
    }
    assert load_config(write("extends: base.yaml\nnetwork: {options: null}\n")).network.options == {}


def test_an_error_in_an_extended_file_names_that_file(write: Write) -> None:
    write(MINIMAL + "seed: -3\n", "base.yaml")
    path = write("extends: base.yaml\ntraining: {loss: 3}\n")
    assert errors(path) == [
        "base.yaml:3:1: seed: expected a whole number of at least 0, got -3",
        "x.yaml:2:12: training.loss: expected text, got 3",
    ]
    assert load_config(path, ["seed=0", "training.loss=cross_entropy"]).seed == 0


def test_extends_that_leads_nowhere_or_in_a_circle(write: Write) -> None:
    assert errors(write(MINIMAL + "extends: none.yaml\n")) == ["x.yaml:3:1: extends: no such file: none.yaml"]
    assert errors(write(MINIMAL + "extends: {a: 1}\n")) == [
        "x.yaml:3:1: extends: expected a path or a list, each a path, got a mapping"
    ]
    write("extends: x.yaml\n", "b.yaml")
    assert errors(write(MINIMAL + "extends: b.yaml\n")) == [
        "b.yaml:1:1: extends: a file may not extend itself: x.yaml -> b.yaml -> x.yaml"
    ]
    # The same file twice, on two ways, is no circle.
    write(MINIMAL, "root.yaml")
    write("extends: root.yaml\nseed: 5\n", "left.yaml")
    write("extends: root.yaml\n", "right.yaml")
    assert load_config(write("extends: [left.yaml, right.yaml]\n")).seed == 5
    assert errors(write("extend: root.yaml\n" + MINIMAL)) == [
        "x.yaml:1:1: extend: unknown key, did you mean 'extends'?"
    ]


def test_paths_belong_to_the_file_that_says_them(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("data: {manifest: m.json, root: images}\n", "far/base.yaml")
    path = write("extends: far/base.yaml\nname: a\ndata: {root: ../mine}\n", "near/x.yaml")
    write("data: {manifest: m.json, root: images}\n", "near/far/base.yaml")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(Path("../near/x.yaml"))
    assert config.data == DataSection(manifest=tmp_path / "near/far/m.json", root=tmp_path / "mine")
    assert config.workspace == elsewhere / "work"
    assert load_config(path, ["data.manifest=m.json"]).data.manifest == elsewhere / "m.json"
    assert load_config(path, ["data.manifest=~/m.json"]).data.manifest == Path.home() / "m.json"


def test_a_linked_manifest_keeps_its_own_folder(write: Write, tmp_path: Path) -> None:
    write("{}", "annex/object.json")
    (tmp_path / "m.json").symlink_to(tmp_path / "annex" / "object.json")
    assert load_config(write(MINIMAL)).data.manifest == tmp_path / "m.json"


def test_overrides_are_yaml_and_the_last_wins(write: Write) -> None:
    overrides = [
        "training.budget.epochs=3",
        "training.budget.steps=7",
        "preprocessing.patch_size=[8, 16, 24]",
        "network.options={width: 8}",
        "network.options.levels=3",
        "training.gradient_clip=null",
        "tracking.uri=http://127.0.0.1:5000/?a=b",
    ]
    config = load_config(write(MINIMAL), overrides)
    assert (config.training.budget.steps, config.training.budget.epochs) == (7, None)
    assert config.preprocessing.patch_size == (8, 16, 24)
    assert config.network.options == {"width": 8, "levels": 3}
    assert config.training.gradient_clip is None
    assert config.tracking.uri == "http://127.0.0.1:5000/?a=b"


def test_wrong_overrides_are_named_together(write: Write) -> None:
    assert errors(write(MINIMAL), "=3", "a..b=3", "seed=[1", "name.deep=3", "workspace=", "workspac=a") == [
        "--set =3: expected SECTION.KEY=VALUE",
        "--set a..b=3: expected SECTION.KEY=VALUE",
        "--set name.deep=3: name: expected text that matches ^[A-Za-z0-9][A-Za-z0-9_.-]*$, got a mapping",
        "--set seed=[1: seed: broken YAML: expected ',' or ']', but got '<stream end>'",
        "--set workspac=a: workspac: unknown key, did you mean 'workspace'?",
        "--set workspace=: workspace: expected a path, got null",
    ]


def test_options_are_checked_into_the_same_list(write: Write) -> None:
    path = write(
        MINIMAL + "network:\n  name: unet\n  options:\n    widht: 8\ntraining:\n  loss: dise_ce\n  learning_rat: 1\n"
    )
    unet, loss, key = errors(path, option_checks=tables)
    assert unet.startswith("x.yaml:6:5: network.options.widht: ")
    assert "did you mean 'width'?" in unet
    assert loss.startswith("x.yaml:8:3: training.loss: ")
    assert "did you mean 'dice_ce'?" in loss
    assert key == "x.yaml:9:3: training.learning_rat: unknown key, did you mean 'learning_rate'?"
    assert errors(path) == [key]


def test_an_optimiser_and_a_schedule_are_checked_into_the_same_list(write: Write) -> None:
    path = write(
        MINIMAL
        + "training:\n  optimiser: adamw\n  optimiser_options: {momentum: 0.9}\n"
        + "  schedule: one-cycle\n  schedule_options: {power: 2}\n"
    )
    optimiser, schedule = errors(path, option_checks=tables)
    assert optimiser.startswith("x.yaml:5:23: training.optimiser_options.momentum: adamw has no such option")
    assert optimiser.endswith("it has beta1, beta2")
    assert schedule.startswith("x.yaml:6:3: training.schedule: unknown, got 'one-cycle'; expected one of cosine, poly")
    cosine = write(MINIMAL + "training: {schedule_options: {power: 2}}\n")
    assert errors(cosine, option_checks=tables)[0].endswith("cosine has no such option; it has none")


def test_a_default_with_wrong_options_is_named_too(write: Write) -> None:
    override = "training.loss_options.smooth=-1"
    (line,) = errors(write(MINIMAL), override, option_checks=tables)
    assert line.startswith(f"--set {override}: training.loss_options.smooth: ")
    assert load_config(write(MINIMAL), ["training.loss_options.smooth=1"], tables).training.loss == "dice_ce"


def test_the_tables_are_asked_only_about_what_is_no_default(write: Write) -> None:
    asked: list[tuple[str, Mapping[str, Any]]] = []

    def accept(name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
        asked.append((name, options))
        return []

    def record() -> OptionChecks:
        return dict.fromkeys(tables(), accept)

    load_config(write(MINIMAL + "network: {name: unet, options: {}}\n"), [], record)
    assert asked == []
    load_config(write(MINIMAL + "network: {name: dynunet}\n"), ["training.loss_options.a=1"], record)
    assert asked == [("dynunet", {}), ("dice_ce", {"a": 1})]


def test_the_defaults_pass_the_tables() -> None:
    default = Config(name="a", data=DataSection(manifest=Path("m.json")))
    assert check_network(default.network.name, default.network.options) == []
    assert check_loss(default.training.loss, default.training.loss_options) == []
    assert check_optimiser(default.training.optimiser, default.training.optimiser_options) == []
    assert check_schedule(default.training.schedule, default.training.schedule_options) == []


def test_a_dump_loads_to_an_equal_configuration_from_any_folder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write(MINIMAL), ["training.budget.minutes=1.5", "preprocessing.patch_size=[8, 8, 8]"])
    dumped = write(dump_config(config), "runs/deep/config.yaml")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert load_config(dumped) == config
    assert load_config(dumped, ["seed=1"]) != config


# PyYAML writes Unicode's own line breaks as they are, and folds them when it reads them.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029")
KEYS = st.text(CHARACTERS, min_size=1, max_size=8)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(CHARACTERS, max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
TRAPS = st.sampled_from(["1e-3", "no", "null", "~", "", "1:30", "0x1F", "2024-01-01", "*a", "!!int 3", "# x", "a: b"])


@settings(deadline=None, max_examples=80)
@given(options=st.dictionaries(KEYS, VALUES | TRAPS, max_size=4))
def test_any_options_survive_a_dump(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> None:
    data = DataSection(manifest=Path("/m.json"))
    config = Config(name="a", workspace=Path("/w"), data=data, network=NetworkSection(options=options))
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    loaded = load_config(path)
    assert loaded == config
    assert repr(loaded) == repr(config)  # 1 is not 1.0, nor True
