"""Augmentation of a whole batch on the training device: one draw for image and label.

Rotation, scaling, shift and elastic deformation are composed into one sampling grid per patch, and image and label are
interpolated once. Every parameter is keyed by (seed, index of the patch), so that a patch does not depend on the batch,
the worker or a restart.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import AugmentationSection
from pipeline.networks.contract import Size, centre_crop
from pipeline.training.randomness import generator, torch_generator

# What is read beyond the patch, so that the corners of a rotated patch hold anatomy: 20 % on the whole keeps the
# reading under twice the patch's voxels; what lies farther out is zero.
READ_SCALE = 1.2

# Labels are deformed as linear shares of each class, the largest wins: smooth outlines. With more classes than this, by
# the nearest voxel: a staircase, but neither time nor memory a class.
MOST_LINEAR_CLASSES = 8


class Augmentation:
    """Random changes of a batch.

    Args:
        section: probabilities and ranges.
        patch_size: voxels of the image returned.
        target_size: voxels of the label returned, its centre: fewer where the network loses some at its border.
        left_right_axis: axis of the plan's grid between left and right, whose flip swaps classes.
        paired_classes: class indices that swap.
        num_classes: classes, background included.
        seed: of every draw.
    """

    def __init__(
        self,
        section: AugmentationSection,
        *,
        patch_size: Size,
        target_size: Size,
        left_right_axis: int,
        paired_classes: tuple[tuple[int, int], ...],
        num_classes: int,
        seed: int,
    ) -> None:
        self.section = section
        self.patch_size = patch_size
        self.target_size = target_size
        self.seed = seed
        self.flip_axes = tuple("xyz".index(axis) for axis in section.flip_axes)
        self.left_right_axis = left_right_axis
        self.swapped_classes = torch.arange(num_classes)
        for a, b in paired_classes:
            self.swapped_classes[[a, b]] = torch.tensor([b, a])

    @property
    def read_size(self) -> Size:
        """Voxels that a patch is made of."""
        if not self.section.enabled:
            return self.patch_size
        # The rim is even on each axis: the patch stays in the middle.
        x, y, z = (n + 2 * round((READ_SCALE - 1) / 2 * n) for n in self.patch_size)
        return x, y, z

    def __call__(self, image: Tensor, label: Tensor, first_index: int) -> tuple[Tensor, Tensor]:
        """Change a batch.

        Args:
            image: (N, C, *read_size) float32.
            label: (N, *read_size) integer class indices, on the same device.
            first_index: index of the batch's first patch in the whole training.

        Returns:
            image (N, C, *patch_size) float32 and label (N, *target_size) int64.
        """
        changed = centre_crop(image, self.patch_size).contiguous()
        target = centre_crop(label[:, None], self.target_size)[:, 0].long()
        if not self.section.enabled:
            return changed, target
        draws = [generator(self.seed, "augmentation", first_index + i) for i in range(len(image))]
        self._deform(image, label, changed, target, draws)
        self._flip(changed, target, draws)
        self._add_noise(changed, draws, first_index)
        for change in (self._blur, self._scale_intensity, self._coarsen, self._bend_intensity, self._drop_channel):
            change(changed, draws)
        return changed, target

    def _deform(
        self, image: Tensor, label: Tensor, changed: Tensor, target: Tensor, draws: list[np.random.Generator]
    ) -> None:
        """Write the patches that are rotated, scaled, shifted or bent into `changed` and `target`."""
        matrices, shifts, fields = zip(*(self._spatial_draw(random) for random in draws), strict=True)
        rows = [i for i in range(len(draws)) if matrices[i] is not None or fields[i] is not None]
        if not rows:
            return
        grid = torch.stack([self._grid(matrices[i], shifts[i], fields[i], image.device) for i in rows])
        changed[rows] = F.grid_sample(image[rows], grid, mode="bilinear", align_corners=False)
        # (N, X, Y, Z, 3): the target is the middle of what the network sees.
        inner = centre_crop(grid.movedim(-1, 1), self.target_size).movedim(1, -1)
        classes = len(self.swapped_classes)
        if classes > MOST_LINEAR_CLASSES:
            nearest = F.grid_sample(label[rows][:, None].float(), inner, mode="nearest", align_corners=False)
            target[rows] = nearest[:, 0].long()
            return
        own = torch.stack([label[rows] == index for index in range(1, classes)], 1).float()
        shares = F.grid_sample(own, inner, mode="bilinear", align_corners=False)
        share, index = shares.max(1)
        # The background's share is what the foreground leaves; it wins where it is larger than each class's own.
        target[rows] = torch.where(share > 1 - shares.sum(1), index + 1, 0)

    def _grid(
        self,
        matrix: NDArray[np.float64] | None,
        shift: NDArray[np.float64],
        field: NDArray[np.float64] | None,
        device: torch.device,
    ) -> Tensor:
        """Return where each voxel of the patch comes from: (X, Y, Z, 3) in grid_sample's units, axes in reverse order.

        An affine map is a sum of one term an axis, so that no (X * Y * Z, 4) matrix is ever built.
        """
        matrix = np.eye(3) if matrix is None else matrix
        terms = []
        for axis, size in enumerate(self.patch_size):
            centred = np.arange(size) - (size - 1) / 2
            term = centred[:, None] * matrix[None, :, axis] + (shift if axis == 0 else 0)
            terms.append(_tensor(term, device).flip(-1))
        grid = terms[0][:, None, None] + terms[1][None, :, None] + terms[2][None, None, :]
        if field is not None:
            grid += self._displacement(field, device)
        # A box of n voxels runs from -1 to 1 between its outer corners (align_corners=False).
        return grid * _tensor(2 / np.array(self.read_size[::-1]), device)

    def _spatial_draw(
        self, random: np.random.Generator
    ) -> tuple[NDArray[np.float64] | None, NDArray[np.float64], NDArray[np.float64] | None]:
        """Draw matrix, shift and control points; a matrix or field that is not drawn is None."""
        section = self.section
        matrix, shift, field = None, np.zeros(3), None
        if random.random() < section.affine_probability:
            angles = np.deg2rad(random.uniform(-section.rotation_degrees, section.rotation_degrees, 3))
            # A rotation turns the two axes other than its own, which a plane must not leave.
            angles *= np.roll(self._thick, 1) * np.roll(self._thick, 2)
            common = np.exp(random.uniform(*np.log(section.scale)))
            sizes = common * (1 + random.uniform(-section.scale_anisotropy, section.scale_anisotropy, 3))
            # The grid asks where a voxel comes from: things grow where the grid shrinks.
            matrix = _rotation(angles) / sizes
            shift = random.uniform(-section.shift_voxels, section.shift_voxels, 3) * self._thick
        if random.random() < section.elastic_probability:
            points = [int(np.ceil(n / section.elastic_spacing_voxels)) + 3 for n in self.patch_size]
            field = random.normal(0.0, section.elastic_voxels, (3, *points)) * self._thick[:, None, None, None]
        return matrix, shift, field

    @property
    def _thick(self) -> NDArray[np.float64]:
        """1 for each axis along which a patch has more than one voxel, 0 for that of a 2-D network's planes."""
        return np.array([float(size > 1) for size in self.patch_size])

    def _displacement(self, field: NDArray[np.float64], device: torch.device) -> Tensor:
        """Return the displacement in voxels (X, Y, Z, 3), axes in reverse order, of control points (3, *points).

        A cubic B-spline on each axis (Rueckert et al. 1999): smooth, and three small matrix products.
        """
        dense = _tensor(field, device)
        for size, points in zip(self.patch_size, field.shape[1:], strict=True):
            weights = _tensor(_spline_weights(size, points, self.section.elastic_spacing_voxels), device)
            # The axis of control points in front goes, the axis of voxels is added behind: (3, ..., size).
            dense = torch.tensordot(dense, weights, dims=([1], [1]))
        return dense.movedim(0, -1).flip(-1)

    def _flip(self, image: Tensor, target: Tensor, draws: list[np.random.Generator]) -> None:
        """Flip each chosen axis with probability one half; the left-right one swaps the paired classes."""
        for axis in self.flip_axes:
            rows = [i for i, random in enumerate(draws) if random.random() < 0.5]
            if not rows:
                continue
            image[rows] = image[rows].flip(axis + 2)
            flipped = target[rows].flip(axis + 1)
            swaps = axis == self.left_right_axis
            target[rows] = self.swapped_classes.to(target.device)[flipped] if swaps else flipped

    def _add_noise(self, image: Tensor, draws: list[np.random.Generator], first_index: int) -> None:
        """Add Gaussian noise, drawn on the device."""
        for i, std in _chosen(draws, self.section.noise_probability, self.section.noise_std):
            noise = torch_generator(self.seed, "noise", first_index + i, image.device)
            image[i] += std * torch.randn(image[i].shape, generator=noise, device=image.device)

    def _blur(self, image: Tensor, draws: list[np.random.Generator]) -> None:
        """Blur with a separable Gaussian, cut at three standard deviations."""
        for i, sigma in _chosen(draws, self.section.blur_probability, self.section.blur_sigma_voxels):
            image[i] = _gaussian_blur(image[i], sigma)

    def _scale_intensity(self, image: Tensor, draws: list[np.random.Generator]) -> None:
        """Change brightness, then contrast about the patch's mean within its own range, channel by channel."""
        for i, factor in _chosen(draws, self.section.brightness_probability, self.section.brightness):
            image[i] *= factor
        for i, factor in _chosen(draws, self.section.contrast_probability, self.section.contrast):
            low, high = _range(image[i])
            mean = image[i].mean((1, 2, 3), keepdim=True)
            image[i] = ((image[i] - mean) * factor + mean).clamp(low, high)

    def _coarsen(self, image: Tensor, draws: list[np.random.Generator]) -> None:
        """Take the nearest voxels of a coarser grid and interpolate back, as of a coarser scan."""
        for i, factor in _chosen(draws, self.section.low_resolution_probability, self.section.low_resolution):
            size = [max(1, round(n * factor)) for n in self.patch_size]
            coarse = F.interpolate(image[i][None], size, mode="nearest-exact")
            image[i] = F.interpolate(coarse, list(self.patch_size), mode="trilinear", align_corners=False)[0]

    def _bend_intensity(self, image: Tensor, draws: list[np.random.Generator]) -> None:
        """Raise intensities, rescaled to 0..1, to a power; mean and standard deviation of each channel are kept."""
        for i, exponent in _chosen(draws, self.section.gamma_probability, self.section.gamma):
            low, high = _range(image[i])
            std, mean = torch.std_mean(image[i], (1, 2, 3), keepdim=True)
            bent = ((image[i] - low) / (high - low).clamp_min(1e-6)).pow(exponent)
            bent_std, bent_mean = torch.std_mean(bent, (1, 2, 3), keepdim=True)
            image[i] = (bent - bent_mean) * (std / bent_std.clamp_min(1e-6)) + mean

    def _drop_channel(self, image: Tensor, draws: list[np.random.Generator]) -> None:
        """Set one channel to zero, of those that are not zero already, and never the last of them."""
        for i, place in _chosen(draws, self.section.channel_dropout_probability, (0.0, 1.0)):
            present = image[i].flatten(1).any(1).nonzero()[:, 0]
            if len(present) > 1:
                image[i, present[int(place * len(present))]] = 0


def _tensor(array: NDArray[np.float64], device: torch.device) -> Tensor:
    """Return an array as float32 on the device."""
    return torch.from_numpy(array).float().to(device)


def _chosen(
    draws: list[np.random.Generator], probability: float, limits: tuple[float, float]
) -> list[tuple[int, float]]:
    """Return (row, value) of the patches drawn; two numbers are drawn for each, so that one change never shifts
    another's draw.
    """
    numbers = [(random.random(), random.uniform(*limits)) for random in draws]
    return [(i, value) for i, (chance, value) in enumerate(numbers) if chance < probability]


def _range(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return smallest and largest intensity of each channel of (C, X, Y, Z), as (C, 1, 1, 1)."""
    low, high = image.flatten(1).aminmax(dim=1)
    return low[:, None, None, None], high[:, None, None, None]


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rotation by three angles in radians about the first, second and third axis, in that order."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = turn @ matrix
    return matrix


def _spline_weights(size: int, points: int, spacing: float) -> NDArray[np.float64]:
    """Return (size, points): the weight of each control point at each voxel, rows summing to one."""
    positions = np.arange(size) / spacing + 1
    distance = np.abs(positions[:, None] - np.arange(points)[None])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far)


def _gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur (C, X, Y, Z) along each axis with edge values continued."""
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=image.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    blurred = image[:, None]  # (C, 1, X, Y, Z): channels as a batch
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[axis + 2] = len(kernel)
        padding = [0] * 6
        padding[2 * (2 - axis)] = padding[2 * (2 - axis) + 1] = radius
        blurred = F.conv3d(F.pad(blurred, padding, mode="replicate"), kernel.view(shape))
    return blurred[:, 0]
