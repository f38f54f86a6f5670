"""`task: denoise`: all in which learning to denoise differs from learning to segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.config import AugmentationSection
from pipeline.data.manifest import Case
from pipeline.errors import ConfigError, ModelError
from pipeline.inference.windows.streaming import stream_logits, windows_at_once
from pipeline.inference.windows.tiling import Windowing
from pipeline.networks import Network
from pipeline.pictures import draw_images
from pipeline.stages.fold.task import FoldTask
from pipeline.training.diagnosis.stopwatch import Clock, unheard, untimed
from pipeline.training.distributed import gathered, this_share
from pipeline.training.losses import Objective, mean_squared_error
from pipeline.training.sampling.batches import CaseBatches
from pipeline.training.sampling.cases import PatchCase
from pipeline.training.sampling.denoising import NoisyBatches, WithoutLabel, noisy_volume, psnr_db

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DenoisingTask(FoldTask):
    """One fold's training to denoise: all its cases, labelled or not, and of none the label."""

    needs_labels: ClassVar[bool] = False

    def objective(self, network: Network) -> Objective:
        """Join the network to the mean squared error.

        Raises:
            ConfigError: deep supervision is asked for.
        """
        if self.config.training.deep_supervision:
            raise ConfigError("training.deep_supervision: there is none under task: denoise; set it false")
        return Objective(network, mean_squared_error, deep_supervision=False)

    def validation(self, network: Network) -> DenoisingValidation:
        """Return what scores the network on whole volumes."""
        return DenoisingValidation(self, network)

    @property
    def augmentation(self) -> AugmentationSection:
        """Random changes of the clean patches: without noise, which could not be told from that to take away."""
        return self.config.training.augmentation.changed(noise_probability=0.0)

    def batches(
        self, network: Network, clock: Clock = untimed, reached: Callable[[str], None] = unheard
    ) -> CaseBatches:
        """Build the way from the store to noisy batches and what is to become of them."""
        return NoisyBatches(
            super().batches(network, clock, reached),
            noise_std=self.config.training.denoising.noise_std,
            output_size=self.plan.patch_size,
            seed=self.config.seed,
            share=this_share(),
        )

    def patch_cases(self, reached: Callable[[str], None] = unheard) -> list[PatchCase]:
        """Return the training cases without their labels."""
        return [WithoutLabel(case) for case in super().patch_cases(reached)]


@dataclass(frozen=True)
class DenoisingValidation:
    """How much nearer to the clean volume the network brings a noisy one, the noise halfway through its range.

    Attributes:
        task: what is trained.
        network: in training.
    """

    task: DenoisingTask
    network: Network

    def scores(self, cases: Sequence[Case], reached: Callable[[str], None] = unheard) -> dict[str, float]:
        """Return the mean PSNR of the denoised volumes, and what it gained over the noisy ones, the "score".

        Channels that a case lacks are left out, and cases that are constant, which have no PSNR. Without a case the
        scores are 0.

        Raises:
            ModelError: the network's output is infinite or not a number.
        """
        mine = []
        for case in this_share().of(cases):
            reached(case.id)
            mine.append(self._psnr_db(case))
        found = gathered(torch.tensor(mine, dtype=torch.float64).reshape(-1, 2), len(cases)).numpy()
        found = found[np.isfinite(found).all(axis=1)]
        psnr, gain = found.mean(axis=0) if len(found) else (0.0, 0.0)
        return {"psnr_db": float(psnr), "psnr_gain_db": float(gain), "score": float(gain)}

    def _psnr_db(self, case: Case) -> tuple[float, float]:
        """Return a case's PSNR once it is denoised, and what it gained; no numbers for a constant case."""
        clean, noisy, denoised = self._volumes(case)
        present = [i for i, channel in enumerate(self.task.plan.channels) if channel in case.images]
        before, after = (psnr_db(image[present], clean[present]) for image in (noisy, denoised))
        return after, after - before

    def picture(self, case: Case, title: str) -> Figure:
        """Draw the middle slice of the first channel: clean, noisy, denoised."""
        volumes = (volume[0].numpy() for volume in self._volumes(case))
        named = dict(zip(("clean", "noisy", "denoised"), volumes, strict=True))
        return draw_images(named, self.task.store.open(case.id).geometry.spacing_mm, title)

    def _volumes(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        """Return a case's image (C, X, Y, Z) clean, noisy and denoised."""
        std = sum(self.task.config.training.denoising.noise_std) / 2
        clean = torch.from_numpy(self.task.store.read(case.id).image.astype(np.float32))
        noisy = noisy_volume(clean, std, self.task.config.seed, case.id)
        denoised = self._denoised(noisy)
        if not torch.isfinite(denoised).all():
            raise ModelError("the network's output is infinite or not a number; train with training.precision: fp32")
        return clean, noisy, denoised

    def _denoised(self, noisy: Tensor) -> Tensor:
        """Return a volume (C, X, Y, Z) as the network gives it back, window by window."""
        plan, inference = self.task.plan, self.task.config.inference
        windowing = Windowing(plan.patch_size, inference.overlap, inference.blending)
        batch = windows_at_once(self.network, plan.patch_size, self.task.device, self.task.dtype)
        was_training = self.network.training
        self.network.eval()
        try:
            stream = stream_logits([self.network], noisy, windowing, batch=batch, dtype=self.task.dtype)
            # Planes run along the stream's axis, the second here: (C, n, A, B).
            return torch.cat([planes.logits for planes in stream], 1).movedim(1, stream.axis + 1)
        finally:
            self.network.train(was_training)
