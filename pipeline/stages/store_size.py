"""What a store takes on disk, and what making it takes in memory: said before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from pipeline.data.plan import Plan
from pipeline.preparation.examination import CaseExamination

# What making a case takes: per voxel of all channels on their own grids and on the plan's, twice the largest of six
# measurements (3.4 to 11 bytes on OpenMS' four channels at 0.8 to 2 mm), and what small cases take whatever their size
# (200 to 250 MB on STS: the slabs in which labels vote).
BYTES_PER_VOXEL, BYTES_PER_CASE = 24, 256 * 2**20


def needed_bytes(examination: CaseExamination, plan: Plan) -> int:
    """Return what making a case takes in memory at its peak."""
    own = sum(prod(channel.grid.shape) for channel in examination.channels.values())
    return BYTES_PER_CASE + BYTES_PER_VOXEL * (own + len(plan.channels) * planned_voxels(examination, plan))


def stored_bytes(examination: CaseExamination, plan: Plan) -> int:
    """Return what a case takes on disk at most: float16 images and a label on the plan's grid, the label on its own.

    Without what cropping and compression save.
    """
    label_bytes = 1 if len(plan.labels) < 256 else 2
    voxels = planned_voxels(examination, plan)
    native = prod(examination.label.grid.shape) if examination.label else 0
    return voxels * (2 * len(plan.channels) + (label_bytes if examination.label else 0)) + native * label_bytes


def memory_at_once(examinations: Sequence[CaseExamination], plan: Plan, jobs: int, limit_bytes: int) -> int:
    """Return what making cases takes in memory, as many at once as jobs and memory admit; one alone always may."""
    needed = sorted((needed_bytes(one, plan) for one in examinations), reverse=True)
    return max([*needed[:1], min(sum(needed[:jobs]), limit_bytes)])


def planned_voxels(examination: CaseExamination, plan: Plan) -> int:
    """Return the voxels of a case on the plan's grid, before it is cropped."""
    if examination.native is None:
        return 0
    return prod(examination.native.reoriented(plan.orientation).respaced(plan.spacing_mm).shape)
