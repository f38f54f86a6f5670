"""Rotation, scaling, shift, bending and flips: image and label are sampled once, on one grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import AugmentationSection
from pipeline.data.plan import Millimetres
from pipeline.networks.contract import Size, centre_crop
from pipeline.training.randomness import generator
from pipeline.training.sampling.changes import Change, Changes, drawn

# What is read beyond the patch, so that the corners of a rotated patch hold anatomy: 20 % on the whole keeps the
# reading under twice the patch's voxels; what lies farther out is zero.
READ_SCALE = 1.2

# Labels are deformed as linear shares of each class, the largest wins: smooth outlines. With more classes than this, by
# the nearest voxel: a staircase, but neither time nor memory a class.
MOST_LINEAR_CLASSES = 8

Matrices = NDArray[np.float64]


class Deformation:
    """Random changes of where things are, in millimetres: of voxels that are not cubes a rotation does not shear.

    Args:
        section: probabilities and ranges.
        patch_size: voxels of the image returned.
        target_size: voxels of the label returned, its centre.
        num_classes: classes, background and ignored voxels included.
        spacing_mm: of the voxels; shifts and displacements are counted in the shortest side of one.
        seed: of every draw.
    """

    def __init__(
        self,
        section: AugmentationSection,
        *,
        patch_size: Size,
        target_size: Size,
        num_classes: int,
        spacing_mm: Millimetres,
        seed: int,
    ) -> None:
        self.section = section
        self.patch_size = patch_size
        self.target_size = target_size
        self.num_classes = num_classes
        self.seed = seed
        # Flipped across itself a plane stays as it is, and its left and right labels would not.
        self.flip_axes = tuple(axis for axis in map("xyz".index, section.flip_axes) if patch_size[axis] > 1)
        # 1 for each axis along which a patch has more than one voxel, 0 for that of a 2-D network's planes.
        self._thick = np.array([float(size > 1) for size in patch_size])
        self._sides = np.array(spacing_mm) / min(spacing_mm)
        self._points = tuple(int(np.ceil(n / section.elastic_spacing_voxels)) + 3 for n in patch_size)
        self._splines = [
            torch.from_numpy(spline_weights(size, points, section.elastic_spacing_voxels)).float()
            for size, points in zip(patch_size, self._points, strict=True)
        ]

    @property
    def read_size(self) -> Size:
        """Voxels that a patch is made of; the rim is even on each axis, so that the patch stays in the middle."""
        x, y, z = (n + 2 * round((READ_SCALE - 1) / 2 * n) for n in self.patch_size)
        return x, y, z

    def draw(self, indices: Sequence[int]) -> dict[str, Change]:
        """Draw for patches, by their numbers: "sampled" rows with their matrices (k, 3, 4), which of those are "bent"
        with control points (j, 3, *points), and the rows of each "flip AXIS".
        """
        section = self.section
        generators = [generator(self.seed, "deformation", index) for index in indices]
        # Of each patch as many numbers whatever comes of them, so that one change never shifts another's draw.
        chances = np.stack([random.random(5) for random in generators])  # (N, 5): affine, elastic, flips of x, y, z
        numbers = np.stack([random.uniform(-1, 1, 10) for random in generators])  # (N, 10)
        affine, elastic = chances[:, 0] < section.affine_probability, chances[:, 1] < section.elastic_probability
        sampled, bent = np.flatnonzero(affine | elastic), np.flatnonzero(elastic)
        maps = np.where(affine[:, None, None], self._affine_maps(numbers), np.eye(3, 4))
        points = [section.elastic_voxels * generators[row].standard_normal((3, *self._points)) for row in bent]
        changes = drawn("sampled", sampled, maps[sampled])
        reach = (self._thick / self._sides)[:, None, None, None]
        changes |= drawn("bent", np.searchsorted(sampled, bent), np.array(points) * reach)
        for axis in self.flip_axes:
            flipped = np.flatnonzero(chances[:, 2 + axis] < 0.5)
            changes |= drawn(flip_of(axis), flipped, np.zeros((len(flipped), 0)))
        return changes

    def _affine_maps(self, numbers: NDArray[np.float64]) -> Matrices:
        """Make of (N, 10) numbers between -1 and 1 the maps (N, 3, 4) from a patch's voxels to those read, about their
        middles.
        """
        section = self.section
        # A rotation turns the two axes other than its own, which a plane must not leave.
        angles = (
            np.deg2rad(section.rotation_degrees) * numbers[:, :3] * np.roll(self._thick, 1) * np.roll(self._thick, 2)
        )
        smallest, largest = np.log(section.scale)
        common = np.exp((smallest + largest) / 2 + (largest - smallest) / 2 * numbers[:, 3:4])
        sizes = common * (1 + section.scale_anisotropy * numbers[:, 4:7])
        shifts = section.shift_voxels * numbers[:, 7:10] * self._thick / self._sides
        # The grid asks where a voxel comes from: things grow where the grid shrinks. From voxels to space and back.
        turns = rotations(angles) / sizes[:, None, :] * (self._sides / self._sides[:, None])
        return np.concatenate([turns, shifts[:, :, None]], axis=2)

    def __call__(self, image: Tensor, label: Tensor, changes: Changes) -> tuple[Tensor, Tensor]:
        """Change where things are.

        Args:
            image: (N, C, *read_size) float32.
            label: (N, *read_size) class indices.
            changes: as drawn for these patches, on the same device.

        Returns:
            image (N, C, *patch_size) and label (N, *target_size) int64; neither shares memory with what was given.
        """
        changed = centre_crop(image, self.patch_size).clone(memory_format=torch.contiguous_format)
        target = centre_crop(label[:, None], self.target_size)[:, 0].long()
        if sampled := changes.get("sampled"):
            grid = self._grid(sampled.values, changes.get("bent"))
            rows = sampled.rows
            seen, classes = self._sampled(image.index_select(0, rows), label.index_select(0, rows), grid)
            changed.index_copy_(0, rows, seen)
            target.index_copy_(0, rows, classes)
        for axis in self.flip_axes:
            if flip := changes.get(flip_of(axis)):
                changed.index_copy_(0, flip.rows, changed.index_select(0, flip.rows).flip(axis + 2))
                target.index_copy_(0, flip.rows, target.index_select(0, flip.rows).flip(axis + 1))
        return changed, target

    def _grid(self, maps: Tensor, bent: Change | None) -> Tensor:
        """Return where each voxel of the patches comes from: (k, 3, X, Y, Z) in grid_sample's units, its axes reversed.

        An affine map is a sum of one term an axis, so that no (X * Y * Z, 4) matrix is ever built.
        """
        terms = []
        for axis, size in enumerate(self.patch_size):
            centred = torch.arange(size, device=maps.device) - (size - 1) / 2
            shape = [len(maps), 3, 1, 1, 1]
            shape[axis + 2] = size
            terms.append((maps[:, :, axis, None] * centred).view(shape))
        grid = terms[0] + maps[:, :, 3, None, None, None] + terms[1] + terms[2]
        if bent is not None:
            grid.index_add_(0, bent.rows, self._displacement(bent.values))
        # A box of n voxels runs from -1 to 1 between its outer corners (align_corners=False).
        for axis, size in enumerate(self.read_size):
            grid[:, axis] *= 2 / size
        return grid.flip(1)

    def _displacement(self, points: Tensor) -> Tensor:
        """Return the displacement in voxels (j, 3, X, Y, Z) of control points (j, 3, *points).

        A cubic B-spline on each axis (Rueckert et al. 1999): smooth, and three small matrix products.
        """
        dense = points
        self._splines = [weights.to(points.device) for weights in self._splines]  # moved once
        for weights in self._splines:
            # The axis of control points in front goes, the axis of voxels is added behind: (j, 3, ..., size).
            dense = torch.tensordot(dense, weights, dims=([2], [1]))
        return dense

    def _sampled(self, image: Tensor, label: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (k, C, *patch_size) and labels (k, *target_size) where a grid finds them."""
        inner = centre_crop(grid, self.target_size)  # the target is the middle of what the network sees
        if self.num_classes > MOST_LINEAR_CLASSES:
            nearest = _sample(label[:, None].float(), inner, "nearest")
            return _sample(image, grid), nearest[:, 0].long()
        own = torch.stack([label == index for index in range(1, self.num_classes)], 1).float()
        if self.patch_size != self.target_size:
            return _sample(image, grid), largest_share(_sample(own, inner))
        both = _sample(torch.cat([image, own], 1), grid)  # in one go: where a voxel comes from is worked out once
        return both[:, : image.shape[1]], largest_share(both[:, image.shape[1] :])


def flip_of(axis: int) -> str:
    """Return the name of a flip of an axis, 0 to 2."""
    return f"flip {'xyz'[axis]}"


def largest_share(shares: Tensor) -> Tensor:
    """Return the class (N, X, Y, Z) int64 with the largest share, of shares (N, K - 1, X, Y, Z) of all but the
    background, which has what they leave; of equal ones the first.
    """
    best = 1 - shares.sum(1)
    winner = torch.zeros(best.shape, dtype=torch.uint8, device=shares.device)
    for index, share in enumerate(shares.unbind(1), start=1):
        winner = torch.maximum(winner, (share > best).to(torch.uint8) * index)
        best = torch.maximum(best, share)
    return winner.long()


def rotations(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (N, 3, 3): rotations by (N, 3) angles in radians, about the first, second and third axis in that order."""
    matrices = np.tile(np.eye(3), (len(angles), 1, 1))
    for axis in range(3):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        cosine, sine = np.cos(angles[:, axis]), np.sin(angles[:, axis])
        turns = np.tile(np.eye(3), (len(angles), 1, 1))
        turns[:, a, a], turns[:, a, b], turns[:, b, a], turns[:, b, b] = cosine, -sine, sine, cosine
        matrices = turns @ matrices
    return matrices


def spline_weights(size: int, points: int, spacing: float) -> NDArray[np.float64]:
    """Return (size, points): the weight of each control point at each voxel, rows summing to one."""
    positions = np.arange(size) / spacing + 1
    distance = np.abs(positions[:, None] - np.arange(points)[None])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far)


def _sample(images: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    """Return images (k, C, ...) at the places of a grid (k, 3, X, Y, Z); zeros beyond them."""
    return F.grid_sample(images, grid.movedim(1, -1), mode=mode, align_corners=False)
