"""The viewer of a batch's page: the most doubtful cases with their volumes, as many as there is room for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from markupsafe import Markup

from pipeline.data.plan import Plan
from pipeline.errors import PipelineError
from pipeline.preparation.preprocessing import class_indices
from pipeline.stages.segmenting.inputs import SegmentInput
from pipeline.stages.segmenting.page import most_doubtful_first
from pipeline.stages.segmenting.report import CaseResult, SegmentReport
from pipeline.stages.shards import Shard
from pipeline.viewer.assets import niivue
from pipeline.viewer.page import ViewedCase, viewer_part
from pipeline.viewer.volumes import MOST_CLASSES, CaseVolumes, case_volumes
from pipeline.volumes.volume import Volume, read_label

log = logging.getLogger(__name__)

# Some ten CTs, or hundreds of small crops: a page of more is slow to open, and nobody looks at more.
ROOM_BYTES = 40e6


def refuse_viewer(plan: Plan, shard: Shard | None = None) -> None:
    """Refuse what no viewer can show, before a batch begins.

    Raises:
        PipelineError: NiiVue is not installed, the model has too many classes, or a shard alone would be shown.
    """
    if shard is not None:
        raise PipelineError(
            f"--viewer with --shard {shard}: give it without --shard once all are through; what is done is skipped"
        )
    if niivue() is None:
        raise PipelineError("--viewer: NiiVue is not installed here; `medseg install-viewer` does it")
    if len(plan.labels) > MOST_CLASSES:
        raise PipelineError(
            f"--viewer: shows at most {MOST_CLASSES - 1} structures, the model has {len(plan.labels) - 1}"
        )


def viewer_of(report: SegmentReport, cases: Sequence[SegmentInput], plan: Plan) -> Markup:
    """Return the viewer of a batch as a part of its page; inputs are read once more, the most doubtful first."""
    sources = {case.name: case for case in cases}
    ordered = [result for result in most_doubtful_first(report.results) if result.output]
    volumes: dict[str, CaseVolumes] = {}
    room = ROOM_BYTES
    for result in ordered:
        made = _volumes_of(report, result, sources[result.name], plan)
        if made is not None:
            room -= made.size_bytes
            if room < 0:
                break
            volumes[result.name] = made
    return viewer_part([_viewed(one, volumes.get(one.name)) for one in ordered], tuple(plan.labels), "expected Dice")


def _volumes_of(report: SegmentReport, result: CaseResult, source: SegmentInput, plan: Plan) -> CaseVolumes | None:
    """Return a case's volumes; None where they can no longer be read, which is said."""
    try:
        label = read_label(report.folder / str(result.output))
        image = next(iter(source.files.values())).read_image()
        return case_volumes(image, Volume(class_indices(label.array, plan), label.geometry))
    except (PipelineError, OSError) as error:
        log.warning("%s: not in the viewer: %s", result.name, error)
        return None


def _viewed(result: CaseResult, volumes: CaseVolumes | None) -> ViewedCase:
    """Return a case as the viewer lists it."""
    sure = result.confidence
    known = {name: label.dice_to_expect for name, label in sure.labels.items()} if sure else {}
    return ViewedCase(
        name=result.name,
        score=1 - sure.doubt if sure else float("nan"),
        mark="doubtful" if result.doubts else "",
        by_class={name: value for name, value in known.items() if value is not None},
        volumes=volumes,
    )
