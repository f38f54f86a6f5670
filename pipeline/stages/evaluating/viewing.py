"""What an evaluation's page lets people look at: cases with their volumes, as many as it has room for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from markupsafe import Markup

from pipeline.config import EvaluationSection
from pipeline.data.plan import Plan
from pipeline.evaluation.report import Rank, mean_dice, worst_first
from pipeline.evaluation.scored import ScoredCase
from pipeline.preparation.preprocessing import class_indices
from pipeline.stages.evaluating.cases import LabelledCase
from pipeline.viewer.assets import niivue
from pipeline.viewer.page import ViewedCase, viewer_part
from pipeline.viewer.volumes import MOST_CLASSES, CaseVolumes, case_volumes
from pipeline.volumes.volume import Volume

log = logging.getLogger(__name__)


class ViewedCases:
    """The cases of an evaluation that its page carries, until there is no more room.

    Args:
        plan: of the models.
        settings: whether there is a viewer, and how much room.

    Attributes:
        full: whether no more cases are taken.
    """

    def __init__(self, plan: Plan, settings: EvaluationSection) -> None:
        self._names = plan.class_names if plan.ignore_label is not None else plan.class_names[:-1]
        self._plan, self._room_bytes = plan, settings.viewer_mb * 1e6
        self._volumes: dict[str, CaseVolumes] = {}
        self.full = settings.viewer == "off" or len(self._names) > MOST_CLASSES or niivue() is None
        if settings.viewer == "auto" and niivue() is None:
            log.info("the report has pictures only; `medseg install-viewer` adds slices and 3-D to the next one")

    def take(self, case_id: str, labelled: LabelledCase, prediction: Volume) -> None:
        """Take a case, unless it is the first that does not fit: then the page is full.

        Args:
            case_id: its id.
            labelled: as it was read.
            prediction: (X, Y, Z) values as in label files, on the native grid.
        """
        if self.full:
            return
        predicted = Volume(class_indices(prediction.array, self._plan), labelled.reference.geometry)
        made = case_volumes(next(iter(labelled.images.values())), predicted, labelled.reference)
        self.full = made.size_bytes > self._room_bytes
        if not self.full:
            self._room_bytes -= made.size_bytes
            self._volumes[case_id] = made

    def part(self, cases: Sequence[ScoredCase], ranks: dict[str, Rank]) -> Markup:
        """Return the viewer as a part of a page, all cases in its list, the worst first; empty where it shows none."""
        viewed = [
            ViewedCase(
                name=case.case_id,
                score=mean_dice(case),
                mark=ranks.get(case.case_id, ""),
                by_class={row.class_name: row.values["dice"] for row in case.rows},
                unknown=self._unknown(case),
                volumes=self._volumes.get(case.case_id),
            )
            for case in worst_first(cases)
        ]
        return viewer_part(viewed, self._names, "mean Dice")

    def _unknown(self, case: ScoredCase) -> tuple[int, ...]:
        """Return the class indices that a case's reference says nothing of."""
        names = {row.class_name for row in case.rows if row.status == "not_annotated"}
        names |= {"ignored"} if self._plan.ignore_label is not None else set()
        return tuple(index for index, name in enumerate(self._names) if name in names)
