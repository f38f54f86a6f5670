"""Predictor: a volume in, its label map out; what `segment`, `evaluate`, training's validation and users' scripts call.

    predictor = Predictor.load(Path("work/runs/hippocampus_unet/fold_0/models/best"))
    label = predictor.predict(read_image(Path("patient.nii.gz")))
    write_label(Path("patient_label.nii.gz"), label)

The models are loaded once and serve any number of volumes. Several are an ensemble: their logits are averaged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.confidence.calibration import Calibration, read_calibration
from pipeline.confidence.judging import Confidence, judge, temperature_of
from pipeline.confidence.measuring import ConfidenceSums
from pipeline.config import InferenceSection, Output
from pipeline.data.plan import Plan
from pipeline.errors import ModelError, ResourceError, VolumeError
from pipeline.free_memory import resident_bytes
from pipeline.geometry import Geometry
from pipeline.hardware import (
    Precision,
    compiled,
    give_freed_memory_back,
    pick_device,
    pick_dtype,
    place_to_predict,
)
from pipeline.inference.labelling import label_from_planes
from pipeline.inference.memory import MemoryPlan, plan_memory
from pipeline.inference.planes import LogitPlanes, ahead
from pipeline.inference.postprocessing import common_rules, postprocess, postprocessing_bytes, with_rules
from pipeline.inference.probabilities import ProbabilityRequest
from pipeline.inference.windows.streaming import LogitStream, stream_logits, windows_at_once
from pipeline.inference.windows.tiling import Windowing
from pipeline.model import Model, load_model, refuse_other_member, refuse_other_task
from pipeline.networks import Network
from pipeline.preparation.preprocessing import PreparedImage, label_values, prepare_images
from pipeline.volumes.body import Body
from pipeline.volumes.volume import Volume

# Is shown finished planes of logits and the axis of the plan's grid that they are stacked along, before they are gone.
Watcher = Callable[[LogitPlanes, int], None]


@dataclass(frozen=True)
class Engine:
    """How the machine is used; but for rounding by device and precision, no label depends on it.

    Attributes:
        device: auto, cpu, cuda or cuda:N.
        precision: auto, fp32, bf16 or fp16; None: as the models were trained.
        batch: windows a forward pass; None: as many as keep the device busy.
        skip_empty: leave windows out that hold no body.
        limit_bytes: what the process may take in memory; None: what it takes now and what is free.
        scratch: folder for the unfinished planes of a case that does not fit otherwise; None: the system's for
            temporary files, which on some lies in memory.
        compile: by torch.compile, where that works: a minute or so at the start, for faster windows.
    """

    device: str = "auto"
    precision: Precision | None = None
    batch: int | None = None
    skip_empty: bool = True
    limit_bytes: int | None = None
    scratch: Path | None = None
    compile: bool = False


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What is made of a prepared case.

    Attributes:
        classes: native.shape, class indices of the smallest unsigned type.
        confidence: how far they can be trusted; measured before postprocessing.
        windows_run: windows that the networks have seen; each flip and each network sees all of them.
        windows_skipped: windows left out, for they hold no body.
    """

    classes: NDArray[Any]
    confidence: Confidence
    windows_run: int
    windows_skipped: int


class Predictor:
    """A network, or an ensemble, and all that is needed to segment volumes with it.

    Attributes:
        plan: how an image is treated before the networks see it; labels and their values.
        inference: overlap, blending, flips and postprocessing, that which was chosen for the models included.
        output: what the networks' logits are of.
        engine: how the machine is used.
        device: where the networks run.
        dtype: they compute in it.
        batch: windows a forward pass; falls for good where the device runs out of memory.
        temperature: logits are divided by it before they become probabilities; labels do not depend on it.
    """

    def __init__(
        self,
        networks: Network | Sequence[Network],
        plan: Plan,
        inference: InferenceSection,
        engine: Engine | None = None,
        *,
        output: Output = "softmax",
        calibrations: Sequence[Calibration] = (),
    ) -> None:
        self.plan, self.inference, self.output = plan, inference, output
        self.engine = engine = engine or Engine()
        self.device = pick_device(engine.device)
        self.dtype = pick_dtype(engine.precision or "auto", self.device)
        self._networks = [networks] if isinstance(networks, Network) else list(networks)
        for network in self._networks:
            place_to_predict(network, self.device)
        self.batch = engine.batch or windows_at_once(self._networks[0], plan.patch_size, self.device, self.dtype)
        if engine.compile:
            self._networks = [self._compiled(network) for network in self._networks]
        self.temperature = temperature_of(calibrations)
        self._calibrations = tuple(calibrations)
        self._windowing = Windowing.of(plan, inference, output)

    @classmethod
    def load(cls, folders: Path | Sequence[Path], engine: Engine | None = None, *, chosen: bool = True) -> Predictor:
        """Load a model, or the members of an ensemble.

        Args:
            folders: of the models, as `medseg train` writes them.
            engine: how the machine is used.
            chosen: with the postprocessing that `medseg find-best` chose for them.

        Raises:
            ModelError: a folder is no whole model, or one that denoises; or models do not make an ensemble.
            ConfigError: the device is not there.
        """
        named = [folders] if isinstance(folders, Path) else list(folders)
        engine = engine or Engine()
        device = pick_device(engine.device)
        models = [_load(folder, device) for folder in named]
        first = models[0]
        for folder, model in zip(named[1:], models[1:], strict=True):
            refuse_other_member(named[0], first, folder, model)
        calibrations = [found for found in map(read_calibration, named) if found is not None]
        inference = first.description.inference
        if chosen:
            inference = with_rules(inference, common_rules(named))
        return cls(
            [model.network for model in models],
            first.plan,
            inference,
            replace(engine, precision=engine.precision or first.description.precision),
            output=first.description.output,
            calibrations=calibrations,
        )

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
            ModelError, ResourceError: as `segment`.
        """
        channels = self._channels(images) if isinstance(images, Volume) else images
        native = native or self.native_of(channels)
        prepared = self.prepare(channels, native)
        return Volume(self.values_of(self.segment(prepared, native).classes), native)

    def prepare(self, images: Mapping[str, Volume], native: Geometry) -> PreparedImage:
        """Bring a case's channels to the plan's grid and intensities: the first half of `predict`.

        Raises:
            VolumeError: the channels are not the plan's, or hold NaN or infinity.
        """
        return prepare_images(images, self.plan, native)

    def segment(
        self,
        prepared: PreparedImage,
        native: Geometry,
        *,
        watch: Sequence[Watcher] = (),
        probabilities: ProbabilityRequest | None = None,
    ) -> Segmentation:
        """Segment a prepared case and say how far the result can be trusted: what `segment` and `evaluate` call.

        Args:
            prepared: by `prepare`.
            native: the grid wanted.
            watch: are shown all planes of logits, in order.
            probabilities: those wanted beside the label map; `temperature` is this predictor's, or 1.

        Raises:
            ModelError: the networks' logits are infinite or not a number.
            ResourceError: the case does not fit in memory.
        """
        memory = self.plan_in_hand(prepared.array, prepared.geometry, native)
        sums = ConfidenceSums(tuple(self.plan.labels), self.output, self.temperature)
        watchers = [lambda planes, _: sums.add(planes.logits), *watch]
        with self.stream(prepared.array, memory, prepared.body) as stream:
            classes = self._label(self._shown(stream, watchers), stream.axis, prepared.geometry, native, probabilities)
        measured = sums.structures(self._fold_dice(stream))
        return Segmentation(classes, judge(measured, self._calibrations), stream.run, stream.skipped)

    def predict_prepared(
        self, image: NDArray[Any], geometry: Geometry, native: Geometry, body: Body | None = None
    ) -> NDArray[Any]:
        """Segment a prepared case: the second half of `predict`, and what validation in training calls.

        Args:
            image: (C, X, Y, Z) on the plan's grid, normalised.
            geometry: the plan's grid of this case.
            native: the grid wanted.
            body: where there is more than air; None: anywhere.

        Returns:
            native.shape, class indices of the smallest unsigned type.

        Raises:
            ModelError: the networks' logits are infinite or not a number.
            ResourceError: the case does not fit in memory.
        """
        memory = self.plan_in_hand(image, geometry, native)
        with self.stream(image, memory, body) as stream:
            return self._label(self._shown(stream), stream.axis, geometry, native)

    @contextmanager
    def stream(self, image: NDArray[Any], memory: MemoryPlan, body: Body | None = None) -> Iterator[LogitStream]:
        """Give the logits of a prepared image as a stream of planes; within the block networks are in eval mode.

        Args:
            image: (C, X, Y, Z) on the plan's grid, normalised.
            memory: says how many windows run at once, and where unfinished planes lie.
            body: where there is more than air; None: anywhere.
        """
        voxels = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
        with self._in_eval_mode():
            stream = stream_logits(
                self._networks,
                voxels,
                self._windowing,
                batch=memory.batch,
                dtype=self.dtype,
                output=self.output,
                body=body if self.engine.skip_empty else None,
                ring_folder=(self.engine.scratch or Path(tempfile.gettempdir())) if memory.ring_on_disk else None,
            )
            yield stream
            if stream.batch < memory.batch:
                self.batch = stream.batch

    @contextmanager
    def _in_eval_mode(self) -> Iterator[None]:
        """Have the networks in eval mode for a while, as validation finds them in training."""
        with ExitStack() as stack:
            for network in self._networks:
                stack.callback(network.train, network.training)
                network.eval()
            yield

    def memory_plan(
        self, prepared: Geometry, native: Geometry, *, input_bytes: int = 0, process_bytes: int | None = None
    ) -> MemoryPlan:
        """Plan the memory of a case before its first window, within the engine's limit.

        Args:
            prepared: the plan's grid of the case.
            native: the grid wanted.
            input_bytes: of the channels as they are read, while they are held beside the image on the plan's grid.
            process_bytes: what the process takes without the case; None: what it takes now.

        Raises:
            ResourceError: the case does not fit, window by window and with the unfinished planes on disk.
        """
        return plan_memory(
            self._networks,
            self._windowing,
            image_shape=(len(self.plan.channels), *prepared.shape),
            native_shape=native.shape,
            input_bytes=input_bytes,
            postprocessing_bytes=postprocessing_bytes(native.shape, self.inference),
            batch=self.batch,
            dtype=self.dtype,
            limit_bytes=self.engine.limit_bytes,
            process_bytes=process_bytes,
        )

    def plan_in_hand(self, image: NDArray[Any], prepared: Geometry, native: Geometry) -> MemoryPlan:
        """Plan the memory of a prepared case, with all that the process has freed where it is short of memory.

        Args:
            image: (C, X, Y, Z) on the plan's grid, in memory.
            prepared: the plan's grid of the case.
            native: the grid wanted.

        Raises:
            ResourceError: the case does not fit, window by window and with the unfinished planes on disk.
        """

        def plan() -> MemoryPlan:
            # The plan counts the image in float32: one of another type stays in memory beside `stream`'s copy.
            counted = image.nbytes if image.dtype == np.float32 else 0
            with self._in_eval_mode():
                return self.memory_plan(prepared, native, process_bytes=max(0, resident_bytes() - counted))

        with suppress(ResourceError):
            found = plan()
            if found.batch == self.batch and not found.ring_on_disk:
                return found
        give_freed_memory_back()  # What was freed is kept for what comes next, and counts as if it were in use.
        return plan()

    def values_of(self, classes: NDArray[Any]) -> NDArray[Any]:
        """Turn class indices into the plan's label values, in the smallest type that holds them all."""
        return label_values(classes, self.plan)

    def native_of(self, images: Mapping[str, Volume]) -> Geometry:
        """Return the native grid of a case without a label: that of its first channel in the plan's order.

        Raises:
            VolumeError: the case has none of the plan's channels.
        """
        for channel in self.plan.channels:
            if channel in images:
                return images[channel].geometry
        raise VolumeError(f"no channel of the model is there: expected {', '.join(self.plan.channels)}")

    def _shown(self, stream: LogitStream, watchers: Sequence[Watcher] = ()) -> Iterator[LogitPlanes]:
        """Yield the planes once watchers have seen them; of logits that are no numbers a label map would be background.

        Raises:
            ModelError: a logit is infinite or not a number.
        """
        for planes in ahead(stream) if stream.device.type == "cuda" else stream:
            if not torch.isfinite(planes.logits).all():
                remedy = "give --precision fp32 (in training: training.precision: fp32)"
                if self.dtype == torch.float32:
                    remedy = "its weights or the image are damaged; copy them again"
                raise ModelError(f"the network's logits are infinite or not a number; {remedy}")
            for watcher in watchers:
                watcher(planes, stream.axis)
            yield planes

    def _label(
        self,
        planes: Iterable[LogitPlanes],
        axis: int,
        prepared: Geometry,
        native: Geometry,
        probabilities: ProbabilityRequest | None = None,
    ) -> NDArray[Any]:
        """Label the native grid from planes of logits, and postprocess."""
        classes = label_from_planes(
            planes,
            axis=axis,
            prepared=prepared,
            native=native,
            thick_axis=self.plan.thick_axis,
            output=self.output,
            probabilities=probabilities,
        )
        return postprocess(classes, self.plan, native, self.inference)

    def _compiled(self, network: Network) -> Network:
        """Return a network compiled for its windows, or as it was where that does not work."""
        size = network.input_size(self.plan.patch_size)
        example = torch.zeros((self.batch, len(self.plan.channels), *size), device=self.device)
        return compiled(network.eval(), example, self.dtype)

    def _fold_dice(self, stream: LogitStream) -> dict[str, float | None]:
        """Return label -> how far the ensemble's members agree; nothing of a single network."""
        return dict(zip(self.plan.labels, stream.agreement.dice, strict=True)) if stream.agreement else {}

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


def _load(folder: Path, device: torch.device) -> Model:
    """Load a model that segments."""
    model = load_model(folder, device)
    refuse_other_task(folder, model.description)
    return model
