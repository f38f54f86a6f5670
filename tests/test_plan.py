"""The plan's file: people read and edit it, and it comes back as it was."""

from pathlib import Path

import pytest
from tiny_models import make_plan

from pipeline.data.plan import read_plan, write_plan
from pipeline.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    plan = make_plan(
        labels={"background": 0, "no": 1, "ü: right": -7},
        label_pairs=(("no", "ü: right"),),
        spacing_mm=(1 / 3, 1e-5, 2.0),
        thick_axis=2,
        reasons={"spacing_mm": "the median\nof 8 cases: " + "long " * 40, "thick_axis": "voxels are long"},
    )
    write_plan(tmp_path / "plan.yaml", plan)
    assert read_plan(tmp_path / "plan.yaml") == plan
    return tmp_path / "plan.yaml"


def test_reasons_stand_above_their_values_and_lists_on_one_line(path: Path) -> None:
    text = path.read_text()
    assert "# voxels are long\nthick_axis: 2\n" in text
    assert "\npatch_size: [16, 16, 8]\n" in text
    assert max(len(line) for line in text.split("\nreasons:")[0].splitlines()) <= 120


def test_a_plan_of_old_keeps_its_digest() -> None:
    # By it runs are resumed and stores told fresh. Computed before plans knew regions, ignored values and networks.
    plan = make_plan()
    assert plan.digest() == "891b342c07f37c603ff9d3226880be159ffc8f600120e2d64c14e5df4a987419"
    said = ({"regions": {"both": ("left", "right"), "right": ("right",)}}, {"ignore_label": 0})
    assert len({plan.digest(), *(plan.changed(**one).digest() for one in said)}) == 3


@pytest.mark.parametrize("name", ["channels", "labels", "regions"])
def test_the_order_of_names_is_part_of_the_digest(name: str) -> None:
    plan = make_plan(channels={"T1": "MR", "T2": "MR"}, regions={"both": ("left", "right"), "right": ("right",)})
    turned = plan.changed(**{name: dict(reversed(getattr(plan, name).items()))})
    assert turned.digest() != plan.digest()
    assert (turned.preprocessing_digest() != plan.preprocessing_digest()) == (name != "regions")


def test_regions_are_structures_and_come_back(tmp_path: Path) -> None:
    plan = make_plan(regions={"both": ("left", "right"), "right": ("right",)}, ignore_label=-1)
    write_plan(tmp_path / "plan.yaml", plan)
    assert read_plan(tmp_path / "plan.yaml") == plan
    assert (plan.output, plan.structures) == ("regions", {"both": (1, 2), "right": (2,)})
    assert (plan.has_ignored, plan.ignored_class, plan.class_names[3]) == (True, 3, "ignored")
    plain = make_plan()
    assert (plain.output, plain.structures) == ("softmax", {"left": (1,), "right": (2,)})
    assert not plain.has_ignored


def test_an_edited_value_is_read(path: Path) -> None:
    path.write_text(path.read_text().replace("patch_size: [16, 16, 8]", "patch_size: [32, 16, 16]"))
    assert read_plan(path).patch_size == (32, 16, 16)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("batch_size: 2", "batch_size: two", r"plan.yaml: batch_size: .*valid integer.*got 'two'"),
        ("batch_size: 2", "batch_sise: 2", r"batch_size: is missing\n.*batch_sise: .*not permitted"),
        ("[16, 16, 8]", "[16, 16]", r"patch_size"),
        ("[16, 16, 8]", "[16, 0, 8]", r"patch_size.1: .*greater than or equal to 1, got 0"),
        ("batch_size: 2", "batch_size: 0", r"batch_size: .*greater than or equal to 1, got 0"),
        ("1.0e-05, 2.0]", "0.0, 2.0]", r"spacing_mm.1: .*greater than 0, got 0.0"),
        ("orientation: RAS", "orientation: RAs", r"orientation: expected R or L, A or P, S or I, .*got 'RAs'"),
        ("scheme: none", "scheme: minmax", r"normalisation.T1.scheme: .*'ct', 'zscore'.*got 'minmax'"),
        ("format_version: 1", "format_version: 0", "version 0, .*--replan"),
        ("format_version: 1", "format_version: 2", "version 2, .*update medseg"),
        ("format_version: 1", "[", "is not YAML"),
    ],
)
def test_what_cannot_be_read_is_said(path: Path, old: str, new: str, expected: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=expected):
        read_plan(path)


@pytest.mark.parametrize(
    ("content", "expected"), [(b"- 1", "mapping"), (b"\xff", "not YAML"), (None, "cannot be read")]
)
def test_a_file_that_is_no_plan(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "plan.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"plan.yaml: .*{expected}"):
        read_plan(path)
