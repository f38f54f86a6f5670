"""The same anatomy in all 48 axis orders comes out at the same millimetres, from the file read to the file written.

Centroids, not Dice: a label map half a voxel away still has a Dice of 0.99.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
from tiny_models import NEAREST_MEAN, NearestMean, make_model, make_plan

from pipeline.geometry import FloatArray, Geometry
from pipeline.model import save_model
from pipeline.networks import NETWORKS
from pipeline.stages import segment
from pipeline.volumes.stored import read_header
from pipeline.volumes.volume import Volume, read_image, read_label
from pipeline.volumes.writing import write_image

ORIENTATIONS = [
    "".join(letters[sign] for letters, sign in zip(axes, signs, strict=True))
    for axes in itertools.permutations(["RL", "AP", "SI"])
    for signs in itertools.product([0, 1], repeat=3)
]
TOLERANCE_MM = 0.1

# Ellipsoids in world mm: centre, radii, intensity. The right one is larger, and they lie at no symmetric places.
LEFT = ((-11.0, 3.0, -4.0), (5.0, 7.0, 6.0), 100.0)
RIGHT = ((10.0, -5.0, 6.0), (7.0, 6.0, 9.0), -100.0)
VALUES = {"left": 1, "right": 7}


def oblique_grid() -> Geometry:
    """Return a RAS grid of 40x38x22 voxels of 1.1x1.2x2.5 mm, turned by 20 and 10 degrees, about the origin."""
    a, b = np.radians([20, 10])
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn * [1.1, 1.2, 2.5]
    affine[:3, 3] = -affine[:3, :3] @ (np.array([39, 37, 21]) / 2)
    return Geometry((40, 38, 22), affine)


def scan(grid: Geometry) -> Volume:
    """Sample the ellipsoids on a grid; each voxel is the mean of 4x4x4 points in it."""
    image = np.zeros(grid.shape, np.float32)
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), axis=-1)
    offsets = (np.arange(4) + 0.5) / 4 - 0.5
    for offset in itertools.product(offsets, repeat=3):
        points = grid.to_mm(voxels + np.array(offset))
        for centre, radii, intensity in (LEFT, RIGHT):
            image += intensity / 64 * ((((points - centre) / np.array(radii)) ** 2).sum(axis=-1) < 1)
    return Volume(image[None], grid)


def in_order(volume: Volume, code: str) -> Volume:
    """Return the same voxels with their axes permuted and flipped to an axis code."""
    axes = volume.geometry.axes_for(code)
    array = volume.array[0].transpose([axis for axis, _ in axes])[tuple(slice(None, None, sign) for _, sign in axes)]
    return Volume(array[None], volume.geometry.reoriented(code))


def centroid_mm(label: Volume, value: int) -> FloatArray:
    return label.geometry.to_mm(np.argwhere(label.array == value)).mean(axis=0)


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Volume]]:
    """Segment the phantom in each axis order, through a grid of another spacing: name -> its file and label map."""
    folder = tmp_path_factory.mktemp("orientations")
    original = scan(oblique_grid())
    for number, code in enumerate(ORIENTATIONS):
        volume = in_order(original, code)
        write_image(folder / "scans" / f"{code}.nii.gz", volume)
        suffix = ("nrrd", "mha")[number % 2]
        write_image(folder / "scans" / f"{code}_{suffix}.{suffix}", volume)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "nearest_mean", lambda task: NearestMean(0.0, LEFT[2], RIGHT[2]))
        plan = make_plan(spacing_mm=(1.0, 1.3, 1.6), patch_size=(24, 24, 16), orientation="RAS")
        save_model(folder / "model", make_model(plan=plan, network=NEAREST_MEAN))
        report = segment.run(str(folder / "model"), [folder / "scans"], folder / "out", device="cpu", precision="fp32")
    assert not report.failures, report.as_text()
    return {r.name: (Path(r.inputs[0]), read_label(folder / "out" / f"{r.name}.nii.gz")) for r in report.results}


def test_all_axis_orders_are_there(segmented: dict[str, tuple[Path, Volume]]) -> None:
    assert len(set(ORIENTATIONS)) == 48
    assert len(segmented) == 96
    assert {label.geometry.orientation for _, label in segmented.values()} == set(ORIENTATIONS)


@pytest.mark.parametrize(("name", "structure"), [("left", LEFT), ("right", RIGHT)])
def test_centroids_are_where_the_anatomy_is(
    segmented: dict[str, tuple[Path, Volume]], name: str, structure: tuple[tuple[float, ...], ...]
) -> None:
    for case, (_, label) in segmented.items():
        away_mm = np.linalg.norm(centroid_mm(label, VALUES[name]) - structure[0])
        assert away_mm < TOLERANCE_MM, f"{case}: {name} lies {away_mm:.3f} mm away"


def test_volumes_are_those_of_the_anatomy(segmented: dict[str, tuple[Path, Volume]]) -> None:
    for name, (_, radii, _) in (("left", LEFT), ("right", RIGHT)):
        expected_ml = 4 / 3 * np.pi * np.prod(radii) / 1000
        for _, label in segmented.values():
            got_ml = (label.array == VALUES[name]).sum() * label.geometry.voxel_volume_ml
            assert got_ml == pytest.approx(expected_ml, rel=0.1)


def test_label_maps_lie_on_their_inputs_grids(segmented: dict[str, tuple[Path, Volume]]) -> None:
    for source, label in segmented.values():
        grid = read_header(source).geometry
        assert label.geometry.shape == grid.shape
        np.testing.assert_allclose(label.geometry.affine, grid.affine, atol=1e-5)


def test_a_shift_of_half_a_voxel_would_be_seen(segmented: dict[str, tuple[Path, Volume]]) -> None:
    _, label = segmented["LPI"]
    affine = label.geometry.affine.copy()
    affine[:3, 3] += affine[:3, 0] / 2
    shifted = Volume(label.array, Geometry(label.geometry.shape, affine))
    assert np.linalg.norm(centroid_mm(shifted, 1) - LEFT[0]) > TOLERANCE_MM


@pytest.mark.slow
def test_one_real_brain_in_twelve_axis_orders(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "nearest_mean", lambda task: NearestMean(0.0, 92.0))
    plan = make_plan(labels={"background": 0, "bright": 1}, label_pairs=(), spacing_mm=(2.0, 2.0, 2.0))
    save_model(tmp_path / "model", make_model(plan=plan, network=NEAREST_MEAN))
    scans = shared_data / "nasty" / "orientations"
    report = segment.run(str(tmp_path / "model"), [scans], tmp_path / "out", device="cpu", precision="fp32")
    assert not report.failures, report.as_text()
    assert len(report.results) == 12
    first = centroid_mm(read_label(tmp_path / "out" / "RSP.nii.gz"), 1)
    for result in report.results:
        image = read_image(scans / f"{result.name}.nii.gz")
        bright = image.geometry.to_mm(np.argwhere(image.array[0] > 46)).mean(axis=0)
        found = centroid_mm(read_label(tmp_path / "out" / f"{result.name}.nii.gz"), 1)
        assert np.linalg.norm(found - first) < TOLERANCE_MM / 10
        # A threshold before and after resampling a folded cortex differs: a tenth of a voxel; a shift would be half.
        assert np.linalg.norm(found - bright) < 0.24
