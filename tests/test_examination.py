"""Examinations: one read tells grids, distributions and boxes rightly, and distributions merge as if they were one."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from pipeline.data.manifest import Case, ImageFile, Manifest
from pipeline.data.phantoms import LABELS, make_phantom
from pipeline.geometry import Geometry
from pipeline.preparation.examination import LEVELS, MOST_POOLED_VALUES, CaseExamination, Intensities, pooled
from pipeline.preparation.examining import LARGEST_SAMPLE, examination_key, examine_case
from pipeline.volumes.volume import Volume
from pipeline.volumes.writing import write_image, write_label

GRID = Geometry((12, 10, 8), np.diag([-1.0, 1.5, 2.0, 1.0]))


def described(values: np.ndarray) -> Intensities:
    return Intensities(
        voxels=values.size, mean=values.mean(), std=values.std(), quantiles=tuple(np.quantile(values, LEVELS).tolist())
    )


def test_very_many_distributions_merge_within_the_width_of_a_few_values() -> None:
    rng = np.random.default_rng(0)
    samples = [rng.normal(rng.normal(0, 2), 1, 400) for _ in range(400)]
    merged, whole = pooled([described(sample) for sample in samples]), described(np.concatenate(samples))
    assert len(np.unique([np.quantile(sample, LEVELS) for sample in samples])) > MOST_POOLED_VALUES
    assert (merged.voxels, merged.mean, merged.std) == pytest.approx((whole.voxels, whole.mean, whole.std))
    np.testing.assert_allclose(merged.quantiles[1:-1], whole.quantiles[1:-1], atol=0.05)
    assert (merged.quantiles[0], merged.quantiles[-1]) == pytest.approx((whole.quantiles[0], whole.quantiles[-1]))


def read(root: Path, channels: dict[str, str], labelled: bool, labels: dict[str, int]) -> CaseExamination:
    """Examine the files image_CHANNEL.nii.gz and label.nii.gz of a folder."""
    images = {name: ImageFile(path=f"image_{name}.nii.gz") for name in channels}
    case = Case(id="c", patient="c", images=images, label=ImageFile(path="label.nii.gz") if labelled else None)
    fields = {"name": "m", "root": root, "channels": channels, "labels": labels, "cases": (case,)}
    return examine_case(Manifest.model_validate(fields), case)


def examine(root: Path, image: np.ndarray, label: np.ndarray | None, modality: str = "MR") -> CaseExamination:
    grid = GRID if image.shape == GRID.shape else Geometry(image.shape, np.eye(4))
    write_image(root / "image_x.nii.gz", Volume(image[None].astype(np.float32), grid))
    if label is not None:
        write_label(root / "label.nii.gz", Volume(label, grid))
    return read(root, {"x": modality}, label is not None, {"background": 0, "a": 3})


def test_a_case_is_described_as_it_is(tmp_path: Path) -> None:
    image = np.zeros(GRID.shape)
    image[2:9, 1:7, 3:8] = np.random.default_rng(0).normal(100, 20, (7, 6, 5))
    label = np.zeros(GRID.shape, np.uint8)
    label[3:6, 2:5, 4:6] = 3
    examination = examine(tmp_path, image, label)
    channel = examination.channels["x"]
    assert examination.problems == ()
    assert examination.usable
    assert examination.native == GRID
    assert channel.grid.geometry == GRID
    assert channel.nonzero_box == ((2, 1, 3), (9, 7, 8))
    assert examination.label is not None
    assert examination.label.voxels == {"background": 942, "a": 18}
    stored = image.astype(np.float32).astype(np.float64)
    for found, values in ((channel.body, stored[stored != 0]), (channel.foreground, stored[label == 3])):
        assert found is not None
        expected = described(values)
        assert found.voxels == expected.voxels
        assert np.allclose(
            [found.mean, found.std, *found.quantiles], [expected.mean, expected.std, *expected.quantiles]
        )
    assert CaseExamination.model_validate_json(examination.model_dump_json()) == examination


def test_the_body_of_a_ct_is_all_but_air_and_zero_is_not_air(tmp_path: Path) -> None:
    image = np.full(GRID.shape, -1000.0)
    image[:6] = np.arange(480).reshape(6, 10, 8) - 240
    body = examine(tmp_path, image, None, "CT").channels["x"].body
    assert body is not None
    assert (body.voxels, body.at(0), body.at(1)) == (480, -240, 239)


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    channel = examine(tmp_path, np.zeros(GRID.shape), None).channels["x"]
    assert (channel.body, channel.foreground, channel.nonzero_box) == (None, None, None)
    examination = examine(tmp_path, np.ones(GRID.shape), np.zeros(GRID.shape, np.uint8))
    assert examination.channels["x"].foreground is None
    assert examination.label is not None
    assert examination.label.voxels == {"background": 960, "a": 0}
    (tmp_path / "image_x.nii.gz").unlink()
    nothing = read(tmp_path, {"x": "MR"}, False, {"background": 0, "a": 3})
    assert (nothing.native, nothing.usable, nothing.files) == (None, False, {})


def test_foreground_is_found_on_a_channels_own_grid(tmp_path: Path) -> None:
    phantom = make_phantom(2, modality="CT", channels=2)
    for name, image in phantom.images.items():
        write_image(tmp_path / f"image_{name}.nii.gz", image)
    write_label(tmp_path / "label.nii.gz", phantom.label)
    examination = read(tmp_path, {"CT": "CT", "PET": "PET"}, True, LABELS)
    assert examination.problems == ()
    assert examination.native is not None
    assert examination.native.matches(phantom.label.geometry, 1e-3)
    pet = examination.channels["PET"]
    assert not pet.grid.geometry.matches(examination.native)
    image = phantom.images["PET"]
    points = phantom.label.geometry.to_mm(np.argwhere(phantom.label.array))
    expected = ndimage.map_coordinates(image.array[0], image.geometry.to_index(points).T, order=0)
    assert pet.foreground is not None
    assert pet.foreground.voxels == expected.size
    # Points half-way between two voxels may fall to either.
    assert pet.foreground.mean == pytest.approx(expected.mean(), rel=0.02)


def test_content_is_what_the_voxels_are_whatever_the_packing(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random(GRID.shape)
    first = examine(tmp_path, image, None)
    path = tmp_path / "image_x.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 9))
    repacked = read(tmp_path, {"x": "MR"}, False, {"background": 0, "a": 3})
    other = examine(tmp_path, image[::-1], None)
    contents = [examination.channels["x"].content for examination in (first, repacked, other)]
    assert contents[0] == contents[1] != contents[2]
    assert first.files["image_x.nii.gz"].sha256 != repacked.files["image_x.nii.gz"].sha256


def test_a_large_volume_is_described_from_a_sample(tmp_path: Path) -> None:
    shape = (160, 128, 128)
    image = np.random.default_rng(0).normal(50, 10, shape).astype(np.float32)
    assert image.size > 2 * LARGEST_SAMPLE
    body = examine(tmp_path, image, None).channels["x"].body
    assert body is not None
    assert body.voxels == image.size
    assert body.mean == pytest.approx(50, abs=0.05)
    assert body.at(0.995) == pytest.approx(np.quantile(image, 0.995), abs=0.1)


def test_a_large_structure_counts_by_all_its_voxels(tmp_path: Path) -> None:
    label = np.full((102, 102, 102), 3, np.uint8)
    assert label.size > LARGEST_SAMPLE
    foreground = examine(tmp_path, np.ones(label.shape), label).channels["x"].foreground
    assert foreground is not None
    assert foreground.voxels == label.size


def test_what_is_not_looked_for_in_the_files_is_no_reason_to_read_them_again(tmp_path: Path) -> None:
    file = ImageFile(path="image_x.nii.gz")
    case = Case(id="c", patient="c", images={"x": file}, label=file)
    fields = {"name": "m", "root": tmp_path, "channels": {"x": "MR"}, "labels": {"background": 0, "a": 3}}
    manifest = Manifest.model_validate({**fields, "cases": (case,)})
    hashed = file.changed(sha256="0" * 64)
    same = [{"group": "site"}, {"patient": "p"}, {"fold": 1}, {"images": {"x": hashed}}, {"label": hashed}]
    other = [{"label": None}, {"images": {"x": file.changed(path="other.nii.gz")}}]
    assert {examination_key(manifest, case.changed(**one)) for one in same} == {examination_key(manifest, case)}
    assert examination_key(manifest, case) not in {examination_key(manifest, case.changed(**one)) for one in other}


DRAWS: dict[str, Callable[[np.random.Generator], list[np.ndarray]]] = {
    "one": lambda rng: [rng.normal(0, 1, 4000)],
    "apart": lambda rng: [rng.normal(0, 1, 5000), rng.normal(50, 5, 1000)],
    "of unlike sizes": lambda rng: [rng.gamma(2, 30, n) for n in (200, 20_000, 3000)],
    "whole numbers": lambda rng: [rng.poisson(20, 4000), rng.poisson(30, 9000)],
}


@pytest.mark.parametrize("name", DRAWS)
def test_distributions_merge_as_if_they_were_one(name: str) -> None:
    parts = DRAWS[name](np.random.default_rng(0))
    together = np.concatenate(parts).astype(np.float64)
    merged = pooled([described(part) for part in parts])
    assert merged.voxels == together.size
    assert merged.mean == pytest.approx(together.mean())
    assert merged.std == pytest.approx(together.std())
    # A quantile may be off by half a percent of the voxels: more than what is kept between two levels.
    for level in (0.005, 0.05, 0.25, 0.5, 0.95, 0.995):
        low, high = np.quantile(together, [max(level - 0.004, 0), min(level + 0.004, 1)])
        assert low - 1 <= merged.at(level) <= high + 1 if name == "whole numbers" else low <= merged.at(level) <= high
    assert (merged.at(0), merged.at(1)) == (together.min(), together.max())


def test_nothing_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="no voxels"):
        pooled([])
