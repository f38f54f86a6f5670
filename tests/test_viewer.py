"""The viewer: volumes made small, and the page driven in a real browser."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from browser import NO_GL, SOFTWARE_GL, Browser, browser
from numpy.typing import NDArray
from PIL import Image

from pipeline.evaluation.metrics import METRICS, Row
from pipeline.evaluation.report import Evaluation, write_report
from pipeline.evaluation.scored import ScoredCase
from pipeline.evaluation.statistics import summarise
from pipeline.geometry import Geometry
from pipeline.viewer import assets, volumes
from pipeline.viewer.page import ViewedCase, viewer_part
from pipeline.viewer.volumes import case_volumes
from pipeline.volumes.volume import Volume

NAMES = ("background", "left", "right")
ORANGE, BLUE, MISSED, SPURIOUS = (0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9), (255, 59, 92), (46, 230, 214)
# Oblique in no way but permuted and flipped: (i, j, k) grow to the back, the left and the head.
GRID = Geometry((48, 40, 24), np.diag([1.0, 1.0, 2.0, 1.0])).reoriented("PLS")


def boxes(shift: int = 0) -> NDArray[np.uint8]:
    """Class indices with a box of each class, side by side; moved along the third axis."""
    classes = np.zeros(GRID.shape, np.uint8)
    classes[12:24, 12:24, 6 + shift : 16 + shift] = 1
    classes[12:24, 24:34, 6 + shift : 16 + shift] = 2
    return classes


def image(bright: float = 1.0) -> Volume:
    """A body in air, rising to the front, from 100 to 300 units."""
    array = np.full(GRID.shape, -1000.0, np.float32)
    array[4:36, 4:44] = bright * np.linspace(100, 300, 32, dtype=np.float32)[:, None, None]
    return Volume(array[None], GRID)


def unpacked(text: str) -> nib.Nifti1Image:
    """The volume that a page carries as text."""
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def centroid_mm(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.argwhere(mask).mean(0) @ affine[:3, :3].T + affine[:3, 3]


# Volumes


def test_what_a_page_carries_lies_where_it_lay_and_is_cropped_to_the_body() -> None:
    made = case_volumes(image(), Volume(boxes(1), GRID), Volume(boxes(), GRID))
    shown = {name: unpacked(getattr(made, name) or "") for name in ("image", "prediction", "reference")}
    # The body and four voxels around it, where there are as many; the third axis is all body.
    assert {part.shape for part in shown.values()} == {(40, 48, 24)}
    for name, shift in (("prediction", 1), ("reference", 0)):
        found = np.asarray(shown[name].dataobj)
        assert found.dtype == np.uint8
        for k in (1, 2):
            expected = centroid_mm(boxes(shift) == k, GRID.affine)
            assert centroid_mm(found == k, shown[name].affine) == pytest.approx(expected)
    # In the units of the image, to half a step of the 8 bits; what is brighter than the window is white.
    grey, window = np.asarray(shown["image"].dataobj), made.window
    assert window == (-1000.0, pytest.approx(290, abs=15))
    step = (window[1] - window[0]) / 255
    assert grey == pytest.approx(image().array[0].clip(*window), abs=0.51 * step)
    assert GRID.to_index(np.array(made.focus_mm)) == pytest.approx((12, 12, 6), abs=11)
    assert boxes()[tuple(GRID.to_index(np.array(made.focus_mm)).round().astype(int))] > 0


def test_air_around_the_body_is_left_out_and_a_structure_in_it_is_not() -> None:
    wide = Geometry((100, 90, 60), GRID.affine)
    array = np.full(wide.shape, -1000.0, np.float32)
    array[40:60, 30:50, 20:40] = 50
    classes = np.zeros(wide.shape, np.uint8)
    classes[45:47, 70:72, 25:27] = 1  # in the air beside
    made = case_volumes(Volume(array[None], wide), Volume(classes, wide))
    assert made.reference is None
    shown = unpacked(made.prediction)
    assert shown.shape == (64 - 36, 76 - 26, 44 - 16)
    expected = centroid_mm(classes == 1, wide.affine)
    assert centroid_mm(np.asarray(shown.dataobj) == 1, shown.affine) == pytest.approx(expected)


def test_a_large_volume_is_thinned_along_its_finest_axes_and_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "LARGEST_VOXELS", 20_000)
    made = case_volumes(image(), Volume(boxes(1), GRID), Volume(boxes(), GRID))
    shown = unpacked(made.reference or "")
    assert np.prod(shown.shape) <= 20_000
    assert shown.shape[2] == 24  # 2 mm already
    assert f"the case's own grid is {GRID}" in made.grid
    found = centroid_mm(np.asarray(shown.dataobj) == 1, shown.affine)
    assert found == pytest.approx(
        centroid_mm(boxes() == 1, GRID.affine), abs=0.75
    )  # half a voxel: a tie is the background's


def test_an_image_of_another_grid_and_what_is_no_number_are_taken() -> None:
    fine = Geometry((80, 96, 48), GRID.respaced((0.5, 0.5, 1.0)).affine)
    array = np.kron(image().array[0], np.ones((2, 2, 2), np.float32))
    array[20, 20, 20] = np.nan
    array[21, 20, 20] = np.inf
    made = case_volumes(Volume(array[None], fine), Volume(boxes(), GRID))
    grey = np.asarray(unpacked(made.image).dataobj)
    assert grey.shape == GRID.shape
    assert np.isfinite(grey).all()
    assert grey[20, 20, 12] == pytest.approx(image().array[0, 20, 20, 12], abs=6)


def test_a_constant_image_without_structures_is_shown_as_it_is() -> None:
    made = case_volumes(Volume(np.full((1, *GRID.shape), 7.0, np.float32), GRID), Volume(np.zeros_like(boxes()), GRID))
    assert unpacked(made.image).shape == GRID.shape
    assert made.window[0] < made.window[1]


# The page


def viewed(names: dict[str, float]) -> list[ViewedCase]:
    """Cases by name and Dice; the last one has no volumes, the second is darker, and its prediction lies elsewhere."""
    cases = []
    for number, (name, dice) in enumerate(names.items()):
        made = case_volumes(image(1 - 0.5 * number), Volume(boxes(-1 - number), GRID), Volume(boxes(), GRID))
        last = number == len(names) - 1
        cases.append(ViewedCase(name, dice, "worst" if number == 0 else "", {"left": dice}, (), None if last else made))
    return cases


class Elements(HTMLParser):
    """Collects what a page's elements would fetch, and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {"src", "href", "srcset"} & dict(attrs).keys()


def test_a_name_can_neither_end_a_script_nor_begin_one(niivue: str) -> None:
    name = '</script><script>alert("1")</script>'
    part = viewer_part(viewed({name: 0.5, "b": 0.6}), ("background", "<b>left", "right"), "mean Dice")
    text = part.replace(niivue, "")
    # The volumes of one case, the facts, NiiVue and what drives it.
    assert Elements(text).tags.count("script") == 4
    facts = re.search(r'id="viewer-facts">(.*?)</script>', text)
    assert facts is not None
    assert json.loads(facts.group(1))["cases"][0]["name"] == name
    assert json.loads(facts.group(1))["classes"][0] == {"name": "<b>left", "colour": "#E69F00"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an evaluation of three cases."""
    if assets.niivue() is None:
        pytest.skip("NiiVue is not installed; `make setup` or `medseg install-viewer` does it")
    folder = tmp_path_factory.mktemp("page")
    rows = tuple(Row(name, "scored", 2.0, 1.0, dict.fromkeys(METRICS, 0.5)) for name in NAMES[1:])
    scored = tuple(ScoredCase(name, name, 0, rows, 0.1, 2**20) for name in ("first", "second", "third"))
    summaries = tuple(summarise({case.case_id: case.rows for case in scored}, samples=10, seed=0))
    evaluation = Evaluation("phantoms", {}, "cpu", 1.0, scored, {}, summaries)
    Image.new("RGB", (90, 60), (200, 0, 0)).save(folder / "a.png")
    part = viewer_part(viewed({"first": 0.5, "second": 0.75, "third": 0.9}), NAMES, "mean Dice")
    write_report(folder / "report.html", evaluation, {}, {folder / "a.png": "worst: first"}, part)
    return folder / "report.html"


def near(picture: Image.Image, colour: tuple[int, int, int], tolerance: int = 24) -> int:
    """How many pixels are about of a colour."""
    return int((np.abs(np.asarray(picture).astype(int) - colour).max(-1) <= tolerance).sum())


def shown(open_page: Browser, name: str) -> None:
    """Wait until a case is on the canvas."""
    open_page.wait_for(f"document.getElementById('viewer-canvas').dataset.shown === '{name}'")


def set_slider(open_page: Browser, name: str, value: float) -> None:
    """Move a slider as a hand does."""
    open_page.run(
        f"(() => {{ const e = document.getElementById('viewer-{name}'); e.value = {value}; "
        "e.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


@pytest.mark.slow
def test_the_viewer_in_a_browser(page: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile", *SOFTWARE_GL) as open_page:
        open_page.open(page.as_uri(), (760, 700))
        shown(open_page, "first")
        listed = "[...document.querySelectorAll('#viewer-cases button')].map(e => [e.textContent.trim(), e.disabled])"
        assert open_page.run(listed) == [["firstworst0.5000", False], ["second0.7500", False], ["third0.9000", True]]
        press_view(open_page, "axial")
        whole = open_page.picture("#viewer .stage")
        assert np.asarray(whole).std() > 20
        readout = open_page.run("document.getElementById('viewer-readout').textContent")
        assert readout == "35.0 R  27.0 A  12.0 S mm · intensity 150.1 · prediction: left · reference: left"

        # The prediction's slider: its own colour at 1, the bare image at 0, the reference's line all the while.
        set_slider(open_page, "prediction-opacity", 1)
        filled = open_page.picture("#viewer .stage")
        set_slider(open_page, "prediction-opacity", 0)
        outlined = open_page.picture("#viewer .stage")
        assert near(filled, ORANGE) > 3000
        assert near(filled, BLUE) > 3000
        # The box of the first class is the one to the patient's right, which is on the left.
        assert columns_of(filled, ORANGE).max() < columns_of(filled, BLUE).min() + 3
        assert 100 < near(outlined, ORANGE) < 0.3 * near(filled, ORANGE)
        set_slider(open_page, "reference-opacity", 0)
        assert near(open_page.picture("#viewer .stage"), ORANGE) == 0
        set_slider(open_page, "prediction-opacity", 1)
        assert near(open_page.picture("#viewer .stage"), ORANGE) > 3000

        # A class is hidden by its name in the legend.
        open_page.run("document.querySelector('#viewer-key button').click()")
        without = open_page.picture("#viewer .stage")
        assert near(without, ORANGE) == 0
        assert near(without, BLUE) > 3000
        open_page.run("document.querySelector('#viewer-key button').click()")

        # The prediction lies 2 mm lower than the reference: above it is missed, below it spurious.
        press_view(open_page, "coronal")
        open_page.press("3")
        differing = open_page.picture("#viewer .stage")
        assert near(differing, MISSED, 60) > 100
        assert near(differing, SPURIOUS, 60) > 100
        assert rows_of(differing, MISSED).mean() < rows_of(differing, SPURIOUS).mean()
        open_page.press("3")

        # In 3-D, from black.
        open_page.run("document.getElementById('viewer-canvas').focus()")
        open_page.press("r")
        solid = np.asarray(open_page.picture("#viewer .stage")).astype(int)
        assert (solid.max(-1) < 8).mean() > 0.3
        assert (solid[..., 0] > solid[..., 2] + 60).sum() > 300  # orange in any light

        # The next case, darker by half; then there is none.
        press_view(open_page, "axial")
        open_page.press("1")
        before = open_page.picture("#viewer .stage")
        open_page.press("n")
        shown(open_page, "second")
        assert open_page.run("document.getElementById('viewer-next').disabled")
        assert open_page.run("document.getElementById('viewer-title').textContent") == "second"
        assert abs(np.asarray(before).mean() - np.asarray(open_page.picture("#viewer .stage")).mean()) > 2
        open_page.run("document.querySelector('#viewer-cases button').click()")
        shown(open_page, "first")

        assert open_page.complaints == []
        assert open_page.requests == [page.as_uri()]


def press_view(open_page: Browser, view: str) -> None:
    """Choose a view by its button."""
    open_page.run(f"document.querySelector('#viewer-views [data-view={view}]').click()")


def columns_of(picture: Image.Image, colour: tuple[int, int, int]) -> NDArray[np.intp]:
    """The columns of the pixels that are about of a colour."""
    return np.flatnonzero((np.abs(np.asarray(picture).astype(int) - colour).max(-1) <= 24).sum(0) > 5)


def rows_of(picture: Image.Image, colour: tuple[int, int, int]) -> NDArray[np.intp]:
    """The rows of the pixels that are about of a colour."""
    return np.flatnonzero((np.abs(np.asarray(picture).astype(int) - colour).max(-1) <= 60).any(1))


@pytest.mark.slow
def test_a_browser_without_webgl_shows_pictures_and_says_why(page: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile", *NO_GL) as open_page:
        open_page.open(page.as_uri(), (760, 700))
        assert "no WebGL 2" in open_page.run("document.getElementById('viewer-title').textContent")
        hidden = "getComputedStyle(document.querySelector('#viewer .body')).display"
        assert open_page.run(hidden) == "none"
        assert near(open_page.picture(".pictures img"), (200, 0, 0)) > 1000
        assert open_page.requests == [page.as_uri()]
