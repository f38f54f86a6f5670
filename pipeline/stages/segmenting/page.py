"""report.html of a batch: a picture a case, failures first, then the doubtful ones; of use with thousands of cases."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from numpy.typing import NDArray

from pipeline import evaluation
from pipeline.evaluation.report import NO_VIEWER
from pipeline.geometry import Geometry
from pipeline.pictures import PICTURE_ORIENTATION, draw_strip
from pipeline.records import atomic_path, write_text
from pipeline.stages.segmenting.report import CaseResult, SegmentReport
from pipeline.volumes.label_tables import colour_of
from pipeline.volumes.volume import Volume

REPORT_HTML, PICTURES = "report.html", Path("pictures")
# Of larger batches the pictures are linked, so that the page stays small: 40 are some 2 MB.
LARGEST_EMBEDDED = 40
# A picture's longest axis: more voxels than it has pixels are not looked at.
LARGEST_PREVIEW = 256
# Columns of a case's table: those that the models of a batch have.
MEASURES = {"predicted_dice": "predicted Dice", "expected_dice": "expected Dice", "fold_dice": "folds' Dice"}


@dataclass(frozen=True, eq=False)
class Preview:
    """What is kept of an image until its picture is drawn: every n-th voxel, at most some 60 MB.

    Attributes:
        array: (X, Y, Z), of each axis every `step`-th voxel.
        step: of each axis.
        geometry: of the whole image.
    """

    array: NDArray[Any]
    step: tuple[int, int, int]
    geometry: Geometry

    @classmethod
    def of(cls, image: Volume) -> Preview:
        """Keep what is needed of an image (C, X, Y, Z); its first channel is drawn."""
        step = tuple(-(-n // LARGEST_PREVIEW) for n in image.geometry.shape)
        return cls(_thinned(image.array[0], step).copy(), step, image.geometry)  # type: ignore[arg-type]

    def write(self, out: Path, name: str, classes: NDArray[Any]) -> None:
        """Draw the image with its label map (X, Y, Z), class indices, into the batch's folder of pictures."""
        from PIL import Image

        axes = self.geometry.axes_for(PICTURE_ORIENTATION)
        spacing = tuple(self.geometry.spacing_mm[old] * self.step[old] for old, _ in axes)
        turned = [_turned(array, axes) for array in (self.array, _thinned(classes, self.step))]
        strip = draw_strip(turned[0], spacing, turned[1])  # type: ignore[arg-type]
        with atomic_path(picture_of(out, name)) as temporary:
            Image.fromarray(strip).save(temporary, quality=85, subsampling=0)


def picture_of(out: Path, name: str) -> Path:
    """Return where a case's picture lies."""
    return out / PICTURES / f"{name}.jpg"


@dataclass(frozen=True)
class Row:
    """A structure that was found, as it is shown; `dice` by the keys of MEASURES."""

    label: str
    ml: str
    dice: dict[str, str]
    low: bool


@dataclass(frozen=True)
class Card:
    """A case as it is shown; the picture is what stands in an image's `src`."""

    result: CaseResult
    picture: str | None

    @property
    def kind(self) -> str:
        """How it is marked."""
        return "failed" if self.result.status == "failed" else "doubtful" if self.result.doubts else "usual"

    @property
    def flagged(self) -> bool:
        """Whether somebody should look at it."""
        return self.kind != "usual" or bool(self.result.warnings)

    @property
    def headline(self) -> str:
        """What stands under the name."""
        return self.result.reason or self.result.doubts or self.result.status

    @property
    def rows(self) -> list[Row]:
        """A row for each structure found."""
        return [_row(self.result, label, ml) for label, ml in self.result.volumes_ml.items() if ml]


def write_page(report: SegmentReport, viewer: Markup = NO_VIEWER) -> None:
    """Write report.html: failures first, then the cases by their doubt, the greatest first.

    Args:
        report: of the batch.
        viewer: the part of the page in which cases can be looked at; empty: there is none.
    """
    drawn = [r.name for r in report.results if r.output and picture_of(report.folder, r.name).exists()]
    embed = len(drawn) <= LARGEST_EMBEDDED
    pictures = {name: _source(report.folder, name, embed) for name in drawn}
    counts = {status: sum(r.status == status for r in report.results) for status in ("done", "skipped", "failed")}
    facts = {"model": ", ".join(str(model) for model in report.models)}
    facts |= {"postprocessing": report.rules.as_text()} if report.rules.has_rules else {}
    facts |= {status: str(count) for status, count in counts.items() if count}
    cards = [Card(result, pictures.get(result.name)) for result in most_doubtful_first(report.results)]
    known = {key for card in cards for row in card.rows for key in row.dice}
    page = _template("page_of_batch.html.j2").render(
        title=f"{len(report.results)} cases segmented",
        facts=facts | ({"not reached": str(report.not_reached)} if report.not_reached else {}),
        cards=cards,
        measures={key: title for key, title in MEASURES.items() if key in known},
        colours=_colours(report.results),
        viewer=viewer,
    )
    write_text(report.folder / REPORT_HTML, page)


def _row(result: CaseResult, label: str, ml: float) -> Row:
    """Return a structure as it is shown."""
    sure = result.confidence
    if sure is None or label not in sure.labels:
        return Row(label, f"{ml:.3f}", {}, False)
    values = {key: getattr(sure.labels[label], key) for key in MEASURES}
    dice = {key: f"{value:.2f}" for key, value in values.items() if value is not None}
    return Row(label, f"{ml:.3f}", dice, label in sure.doubtful)


def _thinned(array: NDArray[Any], step: tuple[int, ...]) -> NDArray[Any]:
    """Return every n-th voxel of each axis (X, Y, Z)."""
    return array[tuple(slice(None, None, n) for n in step)]


def _turned(array: NDArray[Any], axes: tuple[tuple[int, int], ...]) -> NDArray[Any]:
    """Return an array (X, Y, Z) with its axes permuted and flipped as `Geometry.axes_for` says."""
    return array.transpose([old for old, _ in axes])[tuple(slice(None, None, sign) for _, sign in axes)]


def most_doubtful_first(results: Sequence[CaseResult]) -> list[CaseResult]:
    """Return failures first, then the cases by their doubt, the greatest first."""
    return sorted(results, key=_place)


def _place(result: CaseResult) -> tuple[bool, float, int]:
    """Return by what a case is ordered; a case without a measure stands among the sure ones."""
    doubt = result.confidence.doubt if result.confidence else 0.0
    return result.status != "failed", -doubt, -len(result.warnings)


def _source(folder: Path, name: str, embed: bool) -> str:
    """Return what stands in an image's `src`."""
    path = picture_of(folder, name)
    if embed:
        return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
    return quote(os.fsencode(path.relative_to(folder)))


def _colours(results: tuple[CaseResult, ...]) -> dict[str, str]:
    """Return label -> the colour of its outline."""
    labels = dict.fromkeys(label for result in results for label in result.volumes_ml)
    return {label: colour_of(index) for index, label in enumerate(labels, 1)}


def _template(name: str) -> Any:
    """Return a template of this folder, which stands in the frame of all our pages."""
    # Imported here: only pages need it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folders = [Path(__file__).parent, Path(evaluation.__file__).parent]
    environment = Environment(
        loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name)
