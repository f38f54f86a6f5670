"""Denoising: noise is added to images, and the network gives them back without it; labels are not looked at.

What an encoder learns so, from any images of the kind, a segmentation may begin with (Vincent et al. 2010).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.networks.contract import Size, centre_crop
from pipeline.training.distributed import ALONE, Share
from pipeline.training.randomness import generator, torch_generator
from pipeline.training.sampling.batches import CaseBatches
from pipeline.training.sampling.cases import PatchCase
from pipeline.training.sampling.intensity import channels_present


@dataclass(frozen=True, eq=False)
class WithoutLabel:
    """A case whose label, if it has one, is not looked at: background everywhere, no class to centre a patch on."""

    case: PatchCase

    @property
    def id(self) -> str:
        """The case's id."""
        return self.case.id

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (C, X, Y, Z) of the image."""
        return self.case.shape

    @property
    def class_voxels(self) -> Mapping[int, NDArray[np.int32]]:
        """No voxels of any class."""
        return {}

    @property
    def annotated(self) -> None:
        """Nothing is told of labels."""
        return None

    def read_image(self, start: Size, stop: Size) -> NDArray[np.float16] | Tensor:
        """Return (C, *(stop - start)) of the normalised image."""
        return self.case.read_image(start, stop)

    def read_label(self, start: Size, stop: Size) -> None:
        """Return that there is nothing but background."""


class NoisyBatches:
    """Number -> noisy image (N, C, *input) and its clean middle (N, C, *output), on the device.

    Args:
        clean: number -> augmented images (N, C, *input), and targets that are not looked at.
        noise_std: range of the noise's standard deviation, drawn evenly for each patch.
        output_size: voxels that the network returns.
        seed: of every draw.
        share: whose part of each batch these are.
    """

    def __init__(
        self,
        clean: CaseBatches,
        *,
        noise_std: tuple[float, float],
        output_size: Size,
        seed: int,
        share: Share = ALONE,
    ) -> None:
        self.clean = clean
        self.share = share
        self.noise_std = noise_std
        self.output_size = output_size
        self.seed = seed

    def __call__(self, number: int) -> tuple[Tensor, Tensor]:
        """Return a batch."""
        image, _ = self.clean(number)
        target = centre_crop(image, self.output_size).clone()
        for i, values in enumerate(image):
            index = self.share.part(number) * len(image) + i
            std = generator(self.seed, "std of the noise", index).uniform(*self.noise_std)
            random = torch_generator(self.seed, "noise to take away", index, image.device)
            values += std * torch.randn(values.shape, generator=random, device=image.device) * channels_present(values)
        return image, target

    def cases_of(self, number: int) -> tuple[str, ...]:
        """Return the id of each patch's case."""
        return self.clean.cases_of(number)

    def cases_at_work(self, number: int) -> tuple[str, ...]:
        """Return the id of the case that is being read for a batch; of each patch's case once all are read."""
        return self.clean.cases_at_work(number)

    def close(self) -> None:
        """End what reads ahead."""
        self.clean.close()


def noisy_volume(image: Tensor, std: float, seed: int, case_id: str) -> Tensor:
    """Return (C, X, Y, Z) with Gaussian noise, of a case always the same, whatever the device."""
    random = torch_generator(seed, f"noise of case {case_id}", 0, torch.device("cpu"))
    return image + std * torch.randn(image.shape, generator=random).to(image.device) * channels_present(image)


def psnr_db(image: Tensor, clean: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, the peak being the clean image's range.

    10 log10(range² / mean squared error); infinite where the images are equal, or the clean one is constant; of both no
    number.

    Args:
        image: of any shape.
        clean: of the same shape.
    """
    low, high = clean.aminmax()
    return float(10 * torch.log10((high - low) ** 2 / (image - clean).square().mean()))
