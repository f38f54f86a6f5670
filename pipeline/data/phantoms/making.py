"""Making phantoms: an anatomy, and scans of it.

A patient is a body with a bright midline and a pair of bright structures, one on each side. All are of one intensity,
so that a network has to learn where a structure lies, not merely how bright it is. Nested phantoms have a brighter core
in each structure and a dark midline, all of it labelled; sparse ones lack part of these labels.

Anatomy is a function of millimetres: any grid can be scanned, and two channels on different grids show the same
patient. A scan adds what makes real volumes hard: an oblique, anisotropic grid in any of the 48 axis orders,
left-handed ones included, a bias field, noise, and MR intensities without a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pipeline.geometry import FloatArray, Geometry
from pipeline.volumes.volume import Volume

LABELS = {"background": 0, "left": 1, "right": 2}
LABEL_PAIRS = (("left", "right"),)

# Of nested phantoms: the organ, both structures, is the union of its rim and its core.
NESTED_LABELS = {"background": 0, "organ_rest": 1, "core": 2, "midline": 3}
NESTED_REGIONS = {"organ": ("organ_rest", "core"), "core": ("core",), "midline": ("midline",)}
IGNORED = 4

Modality = Literal["MR", "CT"]

# Channel names in the network's order, and each channel's modality.
CHANNELS: dict[Modality, tuple[str, str]] = {"MR": ("T1", "T2"), "CT": ("CT", "PET")}

# Intensity of air, tissue, bright structures and their cores in each channel; CT in HU, the others in units of a
# scan's own scale.
_INTENSITIES = {
    "T1": (0.0, 0.5, 0.9, 1.3),
    "T2": (0.0, 0.8, 0.35, 0.1),
    "CT": (-1000.0, 20.0, 180.0, 340.0),
    "PET": (0.0, 1.0, 3.0, 5.0),
}
_CORE_SHARE = 0.6
_BODY_RADII_MM = np.array([27.0, 33.0, 29.0])
_FIELD_OF_VIEW_MM = np.array([64.0, 76.0, 62.0])

Shape = Callable[[FloatArray], NDArray[np.bool_]]


@dataclass(frozen=True)
class Phantom:
    """One examination.

    Attributes:
        images: channel name -> (1, X, Y, Z) float32; the second on its own, coarser grid unless asked otherwise.
        label: (X, Y, Z) uint8 with the values of LABELS, or of NESTED_LABELS and IGNORED, on the first channel's grid.
        annotated_classes: names of the labels that are drawn; None: all.
    """

    images: dict[str, Volume]
    label: Volume
    annotated_classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Anatomy:
    """A patient: which points, in mm from the body's centre, belong to what, and a smooth texture of the tissue."""

    body: Shape
    midline: Shape
    left: Shape
    right: Shape
    core: Shape
    waves: FloatArray  # (n, 4): frequency in radians per mm along x, y, z, and phase


def make_phantom(
    seed: int,
    *,
    geometry: Geometry | None = None,
    modality: Modality = "MR",
    channels: int = 1,
    shared_grid: bool = False,
    empty: bool = False,
    visit: int = 0,
    nested: bool = False,
) -> Phantom:
    """Make one examination of one synthetic patient; equal arguments give equal voxels.

    Args:
        seed: of the patient.
        geometry: grid of the first channel and the label; None draws one of about 40x48x32 voxels.
        modality: MR without a unit, each scan at its own scale, or CT in HU.
        channels: 1 or 2.
        shared_grid: put the second channel on the first one's grid, not on a coarser one of its own.
        empty: leave the paired structures out; the label is all background.
        visit: another number scans the same patient again, on another grid with other noise.
        nested: give both structures, which are then one organ, a core, and label the midline, which is then dark, too.
    """
    anatomy = _draw_anatomy(np.random.default_rng([seed, 0]))
    rng = np.random.default_rng([seed, 1, visit])
    grid = geometry or draw_geometry(rng)
    centre = grid.to_mm((np.array(grid.shape) - 1) / 2)
    images = {}
    for number, channel in enumerate(CHANNELS[modality][:channels]):
        own = grid if number == 0 or shared_grid else grid.respaced(tuple(1.6 * s for s in grid.spacing_mm))  # type: ignore[arg-type]
        images[channel] = _scan(anatomy, own, centre, channel, _drawn(anatomy, empty, nested), rng)
    points = _points_mm(grid) - centre
    label = np.zeros(grid.shape, np.uint8)
    for contains, _, value in _drawn(anatomy, empty, nested):
        label[contains(points)] = value
    return Phantom(images, Volume(label, grid))


def made_sparse(phantom: Phantom, number: int) -> Phantom:
    """Return a nested phantom of which less is known.

    Args:
        phantom: of `make_phantom(nested=True)`.
        number: of the case: of even ones the half towards the feet is ignored, in odd ones the midline is not drawn.
    """
    label, grid = phantom.label.array.copy(), phantom.label.geometry
    if number % 2:
        label[label == NESTED_LABELS["midline"]] = 0
        return replace(phantom, label=Volume(label, grid), annotated_classes=("organ_rest", "core"))
    height_mm = (_points_mm(grid) - grid.to_mm((np.array(grid.shape) - 1) / 2))[..., 2]
    label[height_mm < 0] = IGNORED
    return replace(phantom, label=Volume(label, grid))


def draw_geometry(rng: Generator) -> Geometry:
    """Draw a grid around a patient: oblique by up to 15 degrees, anisotropic, in one of the 48 axis orders."""
    spacing = np.array([*rng.uniform(1.4, 1.7, 2), rng.uniform(1.8, 2.1)])
    shape = np.round(_FIELD_OF_VIEW_MM / spacing).astype(int)
    order = list(rng.permutation(3))
    signs = rng.choice([-1.0, 1.0], 3)
    axes = _rotation(rng.normal(size=3), np.radians(rng.uniform(0, 15))) * spacing * signs
    affine = np.eye(4)
    affine[:3, :3] = axes[:, order]
    extent = affine[:3, :3] @ (shape[order] - 1)
    affine[:3, 3] = rng.uniform(-60, 60, 3) - extent / 2
    return Geometry(tuple(shape[order]), affine)


def _draw_anatomy(rng: Generator) -> _Anatomy:
    """Draw a patient of its own size, the structures apart from the midline and inside the body."""
    size = rng.uniform(0.92, 1.08)
    lift, depth = rng.uniform(-4, 4, 2)

    def structure(side: int) -> tuple[Shape, Shape]:
        centre = size * np.array([side * rng.uniform(12, 14), depth + rng.uniform(-1, 1), lift + rng.uniform(-1, 1)])
        whole = _blob(centre, size * np.array([6.5, 10.0, 8.5]) * rng.uniform(0.9, 1.1, 3), rng)
        return whole, lambda points: whole(centre + (points - centre) / _CORE_SHARE)

    body = _blob(np.zeros(3), size * _BODY_RADII_MM, rng, roughness=0.03)
    midline = _blob(size * np.array([0.0, -17.0, 0.0]), size * np.array([4.5, 4.5, 22.0]), rng)
    (left, left_core), (right, right_core) = structure(-1), structure(1)
    return _Anatomy(
        body=body,
        midline=midline,
        left=left,
        right=right,
        core=lambda points: left_core(points) | right_core(points),
        waves=np.column_stack([rng.normal(0, 0.25, (4, 3)), rng.uniform(0, 2 * np.pi, 4)]),
    )


def _blob(centre: FloatArray, radii: FloatArray, rng: Generator, roughness: float = 0.08) -> Shape:
    """Return the test for an ellipsoid, its radius changed a little by direction, in mm."""
    waves = np.column_stack([rng.normal(0, 2.0, (3, 3)), rng.uniform(0, 2 * np.pi, 3)])

    def contains(points: FloatArray) -> NDArray[np.bool_]:
        scaled = (points - centre) / radii
        distance = np.linalg.norm(scaled, axis=-1)
        directions = scaled / np.maximum(distance, 1e-6)[..., None]
        return np.asarray(distance < 1 + roughness * _ripple(directions, waves))

    return contains


def _ripple(points: FloatArray, waves: FloatArray) -> FloatArray:
    """Return the mean of plane waves at (..., 3) points: smooth, between -1 and 1."""
    return np.asarray(np.sin(points @ waves[:, :3].T + waves[:, 3]).mean(axis=-1), dtype=np.float64)


def _drawn(anatomy: _Anatomy, empty: bool, nested: bool) -> list[tuple[Shape, int, int]]:
    """Return what stands out from the tissue, in painting order: where it is, its place in _INTENSITIES, its label."""
    names = NESTED_LABELS if nested else LABELS
    midline = (anatomy.midline, 0 if nested else 2, names.get("midline", 0))
    if empty:
        return [midline]
    if not nested:
        return [midline, (anatomy.left, 2, names["left"]), (anatomy.right, 2, names["right"])]
    organ = [(shape, 2, names["organ_rest"]) for shape in (anatomy.left, anatomy.right)]
    return [midline, *organ, (anatomy.core, 3, names["core"])]


def _scan(
    anatomy: _Anatomy,
    grid: Geometry,
    centre: FloatArray,
    channel: str,
    drawn: Iterable[tuple[Shape, int, int]],
    rng: Generator,
) -> Volume:
    """Return one channel of a patient on a grid: tissue, texture, bias field, noise and the scan's own scale."""
    air, tissue, bright, _ = _INTENSITIES[channel]
    contrast = abs(bright - tissue)
    points = _points_mm(grid) - centre
    image = np.full(grid.shape, air)
    body = anatomy.body(points)
    image[body] = tissue + 0.25 * contrast * _ripple(points[body], anatomy.waves)
    for contains, intensity, _ in drawn:
        image[contains(points)] = _INTENSITIES[channel][intensity]
    if channel != "CT":
        slope = rng.uniform(-0.004, 0.004, 3)
        image *= np.exp(points @ slope)
    image += rng.normal(0, 0.12 * contrast, grid.shape)
    if channel != "CT":
        # Magnitudes are never negative, and MR and PET scanners scale as they like.
        image = np.abs(image) * np.exp(rng.uniform(np.log(20), np.log(2000)))
    return Volume(image[None].astype(np.float32), grid)


def _points_mm(grid: Geometry) -> FloatArray:
    """Return the (X, Y, Z, 3) voxel centres of a grid in mm."""
    return grid.to_mm(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1))


def _rotation(axis: FloatArray, angle: float) -> FloatArray:
    """Return the (3, 3) rotation about an axis, by Rodrigues' formula; the angle in radians."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)
