"""Changes of intensity: noise, blur, brightness, contrast, coarser voxels, gamma, a channel left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import AugmentationSection
from pipeline.training.randomness import generator, torch_generator
from pipeline.training.sampling.changes import Alone, Change, Draws, change_rows, drawn

SPACE = (2, 3, 4)


class Intensity:
    """Random changes of what voxels look like; the label stays.

    Args:
        section: probabilities and ranges.
        seed: of every draw.
    """

    def __init__(self, section: AugmentationSection, seed: int) -> None:
        self.section = section
        self.seed = seed
        # In the order in which they are made: probability and range.
        self._ranges = {
            "noise": (section.noise_probability, section.noise_std),
            "blur": (section.blur_probability, section.blur_sigma_voxels),
            "brightness": (section.brightness_probability, section.brightness),
            "contrast": (section.contrast_probability, section.contrast),
            "coarse": (section.low_resolution_probability, section.low_resolution),
            "gamma": (section.gamma_probability, section.gamma),
            "dropout": (section.channel_dropout_probability, (0.0, 1.0)),
        }

    def draw(self, indices: Sequence[int]) -> Draws:
        """Draw for patches, by their numbers."""
        # Two numbers of each patch for each change, whatever comes of them: no change shifts another's draw.
        size = (2, len(self._ranges))
        numbers = np.stack([generator(self.seed, "intensity", index).random(size) for index in indices])  # (N, 2, 7)
        changes: dict[str, Change] = {}
        alone: dict[str, tuple[Alone, ...]] = {}
        for place, (name, (probability, (low, high))) in enumerate(self._ranges.items()):
            rows = np.flatnonzero(numbers[:, 0, place] < probability)
            values = low + (high - low) * numbers[rows, 1, place]
            if name in ("noise", "coarse"):
                pairs = zip(rows.tolist(), values.tolist(), strict=True)
                alone[name] = tuple(Alone(row, indices[row], value) for row, value in pairs)
            else:
                changes |= drawn(name, rows, self.kernels(values) if name == "blur" else values)
        return Draws(changes, alone["noise"], alone["coarse"])

    def __call__(self, image: Tensor, draws: Draws) -> None:
        """Change images in place.

        Args:
            image: (N, C, X, Y, Z) float32.
            draws: for these patches, their changes on the images' device.
        """
        changes = draws.changes
        self._add_noise(image, draws.noise)
        change_rows(image, changes, "blur", blurred)
        change_rows(image, changes, "brightness", lambda images, factor: images * _each(factor))
        change_rows(image, changes, "contrast", _stretched)
        for row, _, factor in draws.coarse:
            image[row] = _coarsened(image[row], factor)
        change_rows(image, changes, "gamma", _bent)
        change_rows(image, changes, "dropout", _without_a_channel)

    def kernels(self, sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the Gaussians (k, radius + 1) from their middle outwards, cut where the widest has three standard
        deviations.
        """
        radius = max(1, round(3 * self.section.blur_sigma_voxels[1]))
        kernels: NDArray[np.float64] = np.exp(-0.5 * (np.arange(radius + 1) / sigmas[:, None]) ** 2)
        kernels /= 2 * kernels.sum(1, keepdims=True) - kernels[:, :1]  # all but the middle count twice
        return kernels

    def _add_noise(self, image: Tensor, noise: Sequence[Alone]) -> None:
        """Add Gaussian noise, drawn on the device; a channel that the case lacks is zero, and stays so."""
        for row, number, std in noise:
            random = torch_generator(self.seed, "noise", number, image.device)
            values = torch.randn(image[row].shape, generator=random, device=image.device)
            image[row].add_(values.mul_(channels_present(image[row])), alpha=std)


def blurred(images: Tensor, kernels: Tensor) -> Tensor:
    """Blur images (k, C, X, Y, Z) along each axis by symmetric kernels (k, radius + 1), edge values continued."""
    radius = kernels.shape[1] - 1
    for axis in SPACE:
        size = images.shape[axis]
        padding = [0] * 6
        padding[2 * (4 - axis)] = padding[2 * (4 - axis) + 1] = radius
        padded = F.pad(images, padding, mode="replicate")
        images = padded.narrow(axis, radius, size) * _each(kernels[:, 0])
        for offset in range(1, radius + 1):
            pair = padded.narrow(axis, radius - offset, size) + padded.narrow(axis, radius + offset, size)
            images.addcmul_(pair, _each(kernels[:, offset]))
    return images


def _stretched(images: Tensor, factors: Tensor) -> Tensor:
    """Stretch intensities about each channel's mean, within its own range."""
    low, high = _range(images)
    mean = _mean(images)
    return (images - mean).mul_(_each(factors)).add_(mean).clamp_(low, high)


def _coarsened(image: Tensor, factor: float) -> Tensor:
    """Take the nearest voxels of a coarser grid and interpolate back, as of a coarser scan; of one image."""
    size = list(image.shape[1:])
    coarse = F.interpolate(image[None], [max(1, round(n * factor)) for n in size], mode="nearest-exact")
    return F.interpolate(coarse, size, mode="trilinear", align_corners=False)[0]


def _bent(images: Tensor, exponents: Tensor) -> Tensor:
    """Raise intensities, rescaled to 0..1, to a power; mean and standard deviation of each channel are kept."""
    low, high = _range(images)
    mean = _mean(images)
    deviation = _norm(images - mean)
    bent = (images - low).div_((high - low).clamp_min(1e-6)).pow_(_each(exponents))
    bent -= _mean(bent)
    # A deviation below one millionth does not count; the norm is the deviation times the root of the voxels.
    smallest = 1e-6 * bent[0, 0].numel() ** 0.5
    return bent.mul_(deviation / _norm(bent).clamp_min(smallest)).add_(mean)


def channels_present(image: Tensor) -> Tensor:
    """Tell of images (..., C, X, Y, Z) which channels (..., C, 1, 1, 1) are there; those that a case lacks are zero."""
    return image.abs().amax((-3, -2, -1), keepdim=True) > 0


def _without_a_channel(images: Tensor, places: Tensor) -> Tensor:
    """Set one channel to zero, of those that are not zero already, and never the last of them."""
    present = channels_present(images).flatten(1)  # (k, C)
    count = present.sum(1, keepdim=True)
    chosen = (places[:, None] * count).long() + 1  # the chosen one's rank among the present
    dropped = present & (present.cumsum(1) == chosen) & (count > 1)
    return images.masked_fill(dropped[:, :, None, None, None], 0.0)


def _each(values: Tensor) -> Tensor:
    """Return one number an image, (k,), so that it broadcasts over (k, C, X, Y, Z)."""
    return values[:, None, None, None, None]


def _range(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return smallest and largest intensity of each channel, (k, C, 1, 1, 1).

    On a CPU aminmax takes forty times as long.
    """
    return images.amin(SPACE, keepdim=True), images.amax(SPACE, keepdim=True)


def _mean(images: Tensor) -> Tensor:
    """Return the mean of each channel, (k, C, 1, 1, 1): of planes first, as torch shares a lone sum out among threads,
    so that it would round otherwise than one of many.
    """
    return images.mean((3, 4), keepdim=True).mean(2, keepdim=True)


def _norm(images: Tensor) -> Tensor:
    """Return the root of the sum of squares of each channel, (k, C, 1, 1, 1): of planes first too."""
    planes = torch.linalg.vector_norm(images, dim=(3, 4), keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(planes, dim=2, keepdim=True)
    return norm
