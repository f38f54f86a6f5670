"""Planning: every decision on facts made by hand, from the development cases only."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import PreprocessingSection
from pipeline.data.manifest import Case, ImageFile, Manifest
from pipeline.data.plan import ChannelFingerprint, Fingerprint, Plan, read_plan, write_plan
from pipeline.errors import ConfigError
from pipeline.geometry import Geometry, Grid
from pipeline.preparation.examination import (
    LEVELS,
    Box,
    CaseExamination,
    ChannelExamination,
    Intensities,
    LabelExamination,
)
from pipeline.preparation.planning import fingerprint, make_plan
from pipeline.preparation.sizing import PATCH_VOXELS

Triple = tuple[float, float, float]
SECTION = PreprocessingSection()


def make_facts(spacing: Triple, shape: Triple, *, fine: Triple | None = None, zero_share: float = 0.0) -> Fingerprint:
    """Facts of a data set whose cases are all alike, but for the finest spacings."""
    extent = tuple(n * mm for n, mm in zip(shape, spacing, strict=True))
    channel = ChannelFingerprint(
        mean=40.0,
        std=20.0,
        percentiles={"0.5": -80.0, "5": 0.0, "50": 42.0, "95": 90.0, "99.5": 210.0},
        case_medians=(1.0, 900.0),
        zero_share=zero_share,
    )
    return Fingerprint(
        cases=20,
        spacing_mm={"0": fine or spacing, "10": fine or spacing, "50": spacing, "100": spacing},
        shape=dict.fromkeys(("0", "10", "50", "100"), shape),
        extent_mm=dict.fromkeys(("0", "10", "50", "100"), extent),
        channels={"image": channel},
        label_voxels={"background": 10, "organ": 5},
        label_cases={"background": 20, "organ": 20},
        label_volume_ml={},
    )


def make_manifest(modality: str = "MR", *, folds: tuple[int | None, ...] = (0, 1)) -> Manifest:
    cases = [
        Case(id=f"case_{n}", patient=f"p{n}", images={"image": ImageFile(path=f"{n}.nii.gz")}, fold=fold)
        for n, fold in enumerate(folds)
    ]
    return Manifest(
        name="set",
        root=Path(),
        channels={"image": modality},
        labels={"background": 0, "organ": 1},
        cases=tuple(cases),
    )


def make_examination(
    case_id: str,
    *,
    shape: tuple[int, int, int] = (30, 40, 20),
    spacing: Triple = (1.0, 1.0, 2.0),
    box: Box | None = None,
    level: float = 100.0,
    voxels: int = 50,
) -> CaseExamination:
    """One case in LPS order, its foreground spread evenly over `level` to twice it."""
    grid = Grid.of(Geometry(shape, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])))
    values = Intensities(
        voxels=voxels, mean=1.5 * level, std=level / 12**0.5, quantiles=tuple(level * (1 + x) for x in LEVELS)
    )
    return CaseExamination(
        case_id=case_id,
        key="",
        files={},
        channels={
            "image": ChannelExamination(
                grid=grid,
                content="",
                nonzero_box=box or ((0, 0, 0), shape),
                body=values.changed(voxels=int(np.prod(shape))),
                foreground=values if voxels else None,
            )
        },
        label=LabelExamination(
            grid=grid,
            voxels={"background": int(np.prod(shape)) - voxels, "organ": voxels},
        ),
        problems=(),
    )


def plan_for(facts: Fingerprint, section: PreprocessingSection = SECTION, modality: str = "MR") -> Plan:
    return make_plan(facts, make_manifest(modality), section)


def test_hippocampus_gets_the_fields_patch() -> None:
    plan = plan_for(make_facts((1.0, 1.0, 1.0), (36, 50, 35)))
    assert plan.patch_size == (40, 56, 40)
    assert plan.batch_size == 4
    assert plan.spacing_mm == (1.0, 1.0, 1.0)
    assert plan.thick_axis is None
    assert plan.orientation == "RAS"


@pytest.mark.parametrize(
    ("spacing", "shape"),
    [
        ((0.8, 0.8, 1.0), (512, 512, 600)),
        ((0.7, 0.7, 5.0), (512, 512, 40)),
        ((1.0, 1.0, 1.0), (240, 240, 155)),
        ((0.5, 0.5, 7.5), (300, 300, 7)),
        ((1.0, 1.0, 1.0), (129, 129, 129)),
    ],
)
def test_patches_fit_the_budget_and_can_be_halved(spacing: Triple, shape: Triple) -> None:
    plan = plan_for(make_facts(spacing, shape))
    assert PATCH_VOXELS / 2 < np.prod(plan.patch_size) <= PATCH_VOXELS or np.prod(plan.patch_size) >= np.prod(shape)
    for n, median in zip(plan.patch_size, shape, strict=True):
        assert n <= -(-median // 32) * 32
        assert n < 8 or n % (4 if n < 24 else 8 if n <= 64 else 16) == 0
    assert 2 <= plan.batch_size <= 4
    assert plan.batch_size * np.prod(plan.patch_size) <= 2 * PATCH_VOXELS


def test_a_large_patch_is_a_cube_in_millimetres_as_far_as_the_case_allows() -> None:
    size = np.array(plan_for(make_facts((0.5, 1.0, 1.0), (800, 400, 400))).patch_size) * (0.5, 1.0, 1.0)
    assert size.max() / size.min() < 1.3


def test_a_thick_axis_with_few_slices_takes_a_fine_percentile() -> None:
    plan = plan_for(make_facts((0.7, 0.7, 5.0), (512, 512, 40), fine=(0.6, 0.6, 3.0)))
    assert plan.spacing_mm == (0.7, 0.7, 3.0)
    assert plan.thick_axis == 2
    assert "10th percentile" in plan.reasons["spacing_mm"]


def test_a_thick_axis_with_many_slices_keeps_the_median() -> None:
    plan = plan_for(make_facts((1.0, 1.0, 3.27), (150, 160, 70), fine=(1.0, 1.0, 1.0)))
    assert plan.spacing_mm == (1.0, 1.0, 3.27)
    assert plan.thick_axis == 2


def test_slices_are_not_invented() -> None:
    plan = plan_for(make_facts((0.7, 0.7, 5.0), (512, 512, 40), fine=(0.3, 0.3, 0.3)))
    assert plan.spacing_mm == (0.7, 0.7, 0.7)
    assert plan.thick_axis is None


@pytest.mark.parametrize(
    ("modality", "zero_share", "scheme"),
    [("CT", 0.0, "ct"), ("MR", 0.1, "zscore"), ("MR", 0.6, "zscore_nonzero"), ("PET", 0.0, "zscore")],
)
def test_normalisation_follows_the_modality(modality: str, zero_share: float, scheme: str) -> None:
    plan = plan_for(make_facts((1, 1, 1), (64, 64, 64), zero_share=zero_share), modality=modality)
    chosen = plan.normalisation["image"]
    assert chosen.scheme == scheme
    values = (chosen.low, chosen.high, chosen.mean, chosen.std)
    assert values == ((-80.0, 210.0, 40.0, 20.0) if scheme == "ct" else (None, None, None, None))


def test_a_channel_without_a_development_case_can_still_be_planned() -> None:
    facts = make_facts((1, 1, 1), (64, 64, 64)).changed(channels={})
    assert plan_for(facts, modality="CT").normalisation["image"].scheme == "zscore"


def test_the_configuration_wins_and_the_reasons_say_so() -> None:
    facts = make_facts((1, 1, 1), (36, 50, 35))
    section = PreprocessingSection(
        orientation="LPS",
        spacing_mm=(2.0, 2.0, 7.0),
        patch_size=(16, 24, 32),
        batch_size=7,
        normalisation={"image": "none"},
        crop="none",
    )
    plan = plan_for(facts, section)
    assert (plan.orientation, plan.spacing_mm, plan.patch_size, plan.batch_size, plan.crop) == (
        *("LPS", (2.0, 2.0, 7.0), (16, 24, 32), 7, "none"),
    )
    assert plan.thick_axis == 2
    assert plan.normalisation["image"].scheme == "none"
    for name in ("orientation", "spacing_mm", "patch_size", "batch_size", "normalisation"):
        assert "set in the configuration" in plan.reasons[name]
        assert "set in the configuration" not in plan_for(facts).reasons[name]


def test_an_unknown_channel_in_the_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"T2.*channels are image"):
        plan_for(make_facts((1, 1, 1), (9, 9, 9)), PreprocessingSection(normalisation={"T2": "none"}))


def test_every_value_has_its_reason() -> None:
    plan = plan_for(make_facts((1, 1, 1), (36, 50, 35)))
    assert set(plan.reasons) == {
        *("orientation", "spacing_mm", "thick_axis", "crop", "patch_size", "batch_size", "network", "normalisation")
    }


def test_a_plan_survives_its_file_to_the_last_digit(tmp_path: Path) -> None:
    plan = plan_for(make_facts((1 / 3, 0.1 + 0.2, 1.0), (36, 50, 35)), modality="CT")
    write_plan(tmp_path / "plan.yaml", plan)
    assert read_plan(tmp_path / "plan.yaml").digest() == plan.digest()


def test_the_fingerprint_by_hand() -> None:
    manifest = make_manifest(folds=(0, 1, 2))
    seen = [
        make_examination("case_0", shape=(30, 40, 20), spacing=(1, 1, 2), voxels=50),
        make_examination("case_1", shape=(32, 40, 20), spacing=(1, 1, 3), voxels=100, level=200),
        make_examination("case_2", shape=(40, 40, 20), spacing=(1, 1, 4), voxels=0, box=((5, 0, 3), (15, 40, 20))),
    ]
    facts = fingerprint(seen, manifest, SECTION)
    assert facts.cases == 3
    assert facts.spacing_mm["50"] == (1, 1, 3)
    assert facts.spacing_mm["100"] == (1, 1, 4)
    assert facts.shape["0"] == (10, 40, 17)
    assert facts.extent_mm["50"] == (30, 40, 60)
    assert facts.label_voxels["organ"] == 150
    assert facts.label_cases == {"background": 3, "organ": 2}
    assert facts.label_volume_ml["organ"][1] == pytest.approx((0.1 + 0.3) / 2)
    channel = facts.channels["image"]
    assert channel.mean == pytest.approx((50 * 150 + 100 * 300) / 150)
    assert channel.case_medians == pytest.approx((150, 300))
    assert channel.zero_share == 0
    assert fingerprint(seen, manifest, SECTION.changed(crop="none")).shape["0"] == (30, 40, 20)


def test_shapes_follow_the_plans_orientation() -> None:
    seen = [make_examination("case_0", shape=(30, 40, 20), spacing=(1, 2, 3))]
    facts = fingerprint(seen, make_manifest(), SECTION.changed(orientation="SAR"))
    assert facts.shape["50"] == (20, 40, 30)
    assert facts.spacing_mm["50"] == (3, 2, 1)


def test_held_out_cases_never_influence_the_plan() -> None:
    manifest = make_manifest("CT", folds=(0, 1, None))
    seen = [make_examination("case_0"), make_examination("case_1")]
    odd = make_examination("case_2", shape=(200, 300, 400), spacing=(9, 9, 9), level=1e6, voxels=999)
    facts = fingerprint(seen, manifest, SECTION)
    assert fingerprint([*seen, odd], manifest, SECTION) == facts
    assert make_plan(facts, manifest, SECTION) == make_plan(
        fingerprint([*seen, odd], manifest, SECTION), manifest, SECTION
    )
    # The same case with a fold does: the comparison can fail.
    assert fingerprint([*seen, odd], make_manifest("CT", folds=(0, 1, 0)), SECTION) != facts


def test_nothing_to_plan_from_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no case with a fold"):
        fingerprint([make_examination("case_0")], make_manifest(folds=(None,)), SECTION)


def test_an_edited_ct_normalisation_must_be_complete(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.yaml", plan_for(make_facts((1, 1, 1), (36, 50, 35)), modality="CT"))
    text = (tmp_path / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").write_text(text.replace("high: 210.0", "high: null"))
    with pytest.raises(ConfigError, match="ct needs low, high, mean and std"):
        read_plan(tmp_path / "plan.yaml")
