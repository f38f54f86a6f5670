"""Patch, batch and U-Net for a memory: against a step whose bytes are known by a formula."""

from math import prod

import pytest
from test_planning import make_facts, make_manifest

from pipeline.config import PreprocessingSection
from pipeline.data.plan import Plan
from pipeline.preparation.planning import make_plan
from pipeline.preparation.sizing import LARGEST_GPU_BATCH, PATCH_VOXELS, SMALL_PATCH, Memory
from pipeline.pyramid import topology

CT = make_facts((0.8, 0.8, 0.8), (512, 512, 600)).changed(cases=100)
SMALL = make_facts((1.0, 1.0, 1.0), (36, 50, 35)).changed(cases=200)
AUTO = PreprocessingSection()


def bytes_of(plan: Plan) -> int:
    """A thousand bytes for each voxel and 32 feature maps."""
    assert plan.network is not None
    return 1000 * plan.batch_size * prod(plan.patch_size) * plan.network.width // 32


def plan_for(facts: object, usable: float, *, gpu: bool = True, section: PreprocessingSection = AUTO) -> Plan:
    memory = Memory("a GPU of 8 GB", int(usable), gpu, bytes_of)
    return make_plan(facts, make_manifest(), section, memory)  # type: ignore[arg-type]


@pytest.mark.parametrize("usable", [1e9, 5e9, 2e10, 1e11])
def test_the_patch_is_the_largest_of_which_two_fit(usable: float) -> None:
    plan = plan_for(CT, usable)
    assert plan.batch_size == 2
    assert bytes_of(plan) <= usable < 2.1 * bytes_of(plan)
    assert max(plan.patch_size) / min(plan.patch_size) < 1.5  # a cube in mm, near enough
    assert "until a batch of 2 fits a GPU of 8 GB" in plan.reasons["patch_size"]
    assert plan.network is not None
    assert (plan.network.kernels, plan.network.strides) == topology(plan.patch_size, plan.spacing_mm)


def test_more_memory_gives_a_larger_patch_and_never_more_than_the_case() -> None:
    sizes = [prod(plan_for(CT, usable).patch_size) for usable in (1e9, 1e10, 1e11, 1e13)]
    assert sizes == sorted(set(sizes))
    assert plan_for(CT, 1e13).patch_size == (512, 512, 608)


def test_memory_that_is_left_is_spent_on_the_batch_but_for_its_bounds() -> None:
    assert plan_for(SMALL, 1e12).batch_size == 7  # 5 % of 200 cases
    assert plan_for(SMALL.changed(cases=10_000), 1e12).batch_size == LARGEST_GPU_BATCH
    assert plan_for(SMALL, 5 * 1000 * 40 * 56 * 40 + 1).batch_size == 5
    assert plan_for(SMALL.changed(cases=3), 1e12).batch_size == 2


def test_a_cpu_keeps_its_steps_small_however_much_memory_it_has() -> None:
    plan = plan_for(SMALL, 1e13, gpu=False)
    assert (plan.patch_size, plan.batch_size) == ((40, 56, 40), 4)
    large = plan_for(CT, 1e13, gpu=False)
    assert PATCH_VOXELS / 2 < prod(large.patch_size) <= PATCH_VOXELS
    assert f"{PATCH_VOXELS:,} voxels" in large.reasons["patch_size"]
    assert prod(plan_for(CT, 1e9, gpu=False).patch_size) < prod(large.patch_size)


def test_a_narrower_network_comes_before_a_small_patch() -> None:
    wide, narrow, narrowest = (
        plan_for(CT, usable).network for usable in (2.1e3 * SMALL_PATCH, 1.6e3 * SMALL_PATCH, 5e7)
    )
    assert (wide and wide.width, narrow and narrow.width, narrowest and narrowest.width) == (32, 24, 16)
    assert prod(plan_for(CT, 1.6e3 * SMALL_PATCH).patch_size) >= SMALL_PATCH
    assert (
        "24 feature maps, for with 32 only small patches would fit"
        in plan_for(CT, 1.6e3 * SMALL_PATCH).reasons["network"]
    )


def test_what_does_not_fit_at_all_is_said() -> None:
    assert "even so a batch of 2 does not fit" in plan_for(CT, 10).reasons["patch_size"]


def test_what_the_configuration_sets_wins_and_is_not_measured() -> None:
    def refuse(plan: Plan) -> int:
        raise AssertionError("nothing is left to choose")

    section = PreprocessingSection(patch_size=(64, 64, 64), batch_size=6)
    plan = make_plan(CT, make_manifest(), section, Memory("", 1, True, refuse))
    assert (plan.patch_size, plan.batch_size) == ((64, 64, 64), 6)
    assert plan_for(CT, 1e10, section=PreprocessingSection(batch_size=8)).batch_size == 8
    small, large = (prod(plan_for(CT, 1e10, section=PreprocessingSection(batch_size=n)).patch_size) for n in (8, 2))
    assert small < large


def test_a_network_that_takes_no_such_patch_is_planned_by_voxels() -> None:
    plan = make_plan(CT, make_manifest(), AUTO, Memory("", 10**12, True, lambda plan: None))
    assert plan == make_plan(CT, make_manifest(), AUTO)


def test_few_probes_find_it() -> None:
    asked: list[Plan] = []

    def counted(plan: Plan) -> int:
        asked.append(plan)
        return bytes_of(plan)

    make_plan(CT, make_manifest(), AUTO, Memory("", 10**10, True, counted))
    assert len(asked) <= 12


@pytest.mark.parametrize(("batch", "norm"), [(2, "instance"), (3, "instance"), (4, "batch"), (9, "batch")])
def test_a_batch_norm_wants_four_patches(batch: int, norm: str) -> None:
    network = plan_for(SMALL, 1e12, section=PreprocessingSection(batch_size=batch)).network
    assert network is not None
    assert network.norm == norm


def test_a_patch_that_cannot_be_halved_has_no_unet() -> None:
    plan = plan_for(SMALL, 1e12, section=PreprocessingSection(patch_size=(5, 5, 5), batch_size=2))
    assert plan.network is None
    assert "too small" in plan.reasons["network"]
