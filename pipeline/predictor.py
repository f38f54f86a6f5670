"""Predictor: a volume in, its label map out; what `segment`, `evaluate`, training's validation and users' scripts call.

    predictor = Predictor.load(Path("work/runs/hippocampus_unet/fold_0/models/best"))
    label = predictor.predict(read_image(Path("patient.nii.gz")))
    write_label(Path("patient_label.nii.gz"), label)

The model is loaded once and serves any number of volumes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import InferenceSection
from pipeline.data.plan import Plan
from pipeline.errors import ModelError, VolumeError
from pipeline.geometry import Geometry
from pipeline.hardware import Precision, pick_device, pick_dtype
from pipeline.inference.labelling import label_from_planes
from pipeline.inference.planes import LogitPlanes
from pipeline.inference.postprocessing import postprocess
from pipeline.inference.tiling import Size, Windowing
from pipeline.inference.windows import stream_logits
from pipeline.model import load_model, refuse_other_task
from pipeline.networks import Network
from pipeline.preparation.preprocessing import PreparedImage, prepare_images
from pipeline.volumes.volume import Volume, smallest_type

# Voxels of a forward pass, from which on a larger batch gains nothing (a GPU that cannot hold as many halves it).
BATCH_VOXELS = {"cpu": 64**3, "cuda": 4 * 128**3}


class Predictor:
    """A network and all that is needed to segment volumes with it.

    Attributes:
        plan: how an image is treated before the network sees it; labels and their values.
        inference: overlap, blending, flips and postprocessing.
        device: where the network runs.
        dtype: the network computes in it.
        batch: windows a forward pass; falls for good where the device runs out of memory.
    """

    def __init__(
        self,
        network: Network,
        plan: Plan,
        inference: InferenceSection,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch: int | None = None,
    ) -> None:
        self.plan = plan
        self.inference = inference
        self.device = device
        self.dtype = dtype
        self.batch = batch or windows_at_once(network, plan.patch_size, device)
        self._network = network.to(device)
        self._windowing = Windowing(
            window=plan.patch_size,
            overlap=inference.overlap,
            blending=inference.blending,
            flips=_all_flips(inference),
            paired_classes=plan.paired_classes,
            left_right_axis=plan.left_right_axis,
        )

    @classmethod
    def load(cls, folder: Path, device: str = "auto", precision: Precision | None = None) -> Predictor:
        """Load a model's folder.

        Args:
            folder: of the model, as `medseg train` writes it.
            device: auto, cpu, cuda or cuda:N.
            precision: auto, fp32, bf16 or fp16; None: as the model was trained.

        Raises:
            ModelError: the folder is no whole model, or one that denoises.
            ConfigError: the device is not there.
        """
        chosen = pick_device(device)
        model = load_model(folder, chosen)
        refuse_other_task(folder, model.description)
        dtype = pick_dtype(precision or model.description.precision, chosen)
        return cls(model.network, model.plan, model.description.inference, device=chosen, dtype=dtype)

    def predict(self, images: Mapping[str, Volume] | Volume, native: Geometry | None = None) -> Volume:
        """Segment a case.

        Args:
            images: channel -> (1, X, Y, Z) in the file's units, each on its own grid, those the case lacks left out; or
                one (C, X, Y, Z) volume with all channels of the plan in its order.
            native: the grid wanted; the first channel's where none is given.

        Returns:
            Label map (X, Y, Z) on the native grid, with the plan's label values.

        Raises:
            VolumeError: the channels are not the plan's, or hold NaN or infinity.
        """
        channels = self._channels(images) if isinstance(images, Volume) else images
        native = native or self.native_of(channels)
        prepared = self.prepare(channels, native)
        classes = self.predict_prepared(prepared.array, prepared.geometry, native)
        return Volume(self.values_of(classes), native)

    def prepare(self, images: Mapping[str, Volume], native: Geometry) -> PreparedImage:
        """Bring a case's channels to the plan's grid and intensities: the first half of `predict`.

        Raises:
            VolumeError: the channels are not the plan's, or hold NaN or infinity.
        """
        return prepare_images(images, self.plan, native)

    def predict_prepared(self, image: NDArray[Any], geometry: Geometry, native: Geometry) -> NDArray[Any]:
        """Segment a prepared case: the second half of `predict`, and what validation in training calls.

        Args:
            image: (C, X, Y, Z) on the plan's grid, normalised.
            geometry: the plan's grid of this case.
            native: the grid wanted.

        Returns:
            native.shape, class indices of the smallest unsigned type.

        Raises:
            ModelError: the network's logits are infinite or not a number.
        """
        was_training = self._network.training
        self._network.eval()
        try:
            voxels = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
            stream = stream_logits([self._network], voxels, self._windowing, batch=self.batch, dtype=self.dtype)
            classes = label_from_planes(
                _finite(stream), axis=stream.axis, prepared=geometry, native=native, thick_axis=self.plan.thick_axis
            )
            self.batch = stream.batch
        finally:
            self._network.train(was_training)
        return postprocess(classes, self.plan, native, self.inference)

    def values_of(self, classes: NDArray[Any]) -> NDArray[Any]:
        """Turn class indices into the plan's label values, in the smallest type that holds them all."""
        values = self.plan.class_values
        table = np.array(values, dtype=smallest_type(min(values), max(values)))
        label = np.empty_like(classes, dtype=table.dtype)
        # Plane by plane: numpy makes 64-bit integers of what it looks up.
        for plane, into in zip(classes, label, strict=True):
            into[...] = table[plane]
        return label

    def native_of(self, images: Mapping[str, Volume]) -> Geometry:
        """Return the native grid of a case without a label: that of its first channel in the plan's order.

        Raises:
            VolumeError: the case has none of the plan's channels.
        """
        for channel in self.plan.channels:
            if channel in images:
                return images[channel].geometry
        raise VolumeError(f"no channel of the model is there: expected {', '.join(self.plan.channels)}")

    def _channels(self, image: Volume) -> dict[str, Volume]:
        """Take a volume of all channels apart."""
        if image.array.ndim != 4 or len(image.array) != len(self.plan.channels):
            raise VolumeError(
                f"the model has {len(self.plan.channels)} channels ({', '.join(self.plan.channels)}); "
                f"expected an image (C, X, Y, Z) of as many, got {image.array.shape}"
            )
        return {
            name: Volume(one[None], image.geometry) for name, one in zip(self.plan.channels, image.array, strict=True)
        }


def windows_at_once(network: Network, window: Size, device: torch.device) -> int:
    """Return the windows of a forward pass that keep a device busy."""
    return max(1, BATCH_VOXELS.get(device.type, 1) // math.prod(network.input_size(window)))


def _finite(planes: Iterable[LogitPlanes]) -> Iterator[LogitPlanes]:
    """Yield the planes; where a logit is not a number, a label map would be background without a word.

    Raises:
        ModelError: a logit is infinite or not a number.
    """
    for some in planes:
        if not torch.isfinite(some.logits).all():
            raise ModelError(
                "the network's logits are infinite or not a number; train it with training.precision: fp32"
            )
        yield some


def _all_flips(inference: InferenceSection) -> tuple[tuple[int, ...], ...]:
    """Return all combinations of the flipped axes, none of them first."""
    axes = sorted({"xyz".index(letter) for letter in inference.flip_axes})
    return tuple(flip for n in range(len(axes) + 1) for flip in itertools.combinations(axes, n))
