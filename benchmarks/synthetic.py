"""What benchmarks segment where real scans or a trained network would say no more: a CT phantom, an untrained model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import InferenceSection, NetworkSection
from pipeline.data.plan import ChannelFingerprint, Fingerprint, Normalisation, Plan
from pipeline.geometry import Geometry
from pipeline.model import Model, ModelDescription, save_model
from pipeline.networks.fitting import fitted_plan, network_for
from pipeline.networks.unet import UNet

AIR_HU, TISSUE_HU = -1000.0, 50.0
ORGANS = 120
# Classes that win somewhere, as in a scan that shows a part of the body; the others' logits are computed, and low.
LEVELS = 12
# Anything is familiar to a model that has seen nothing.
ANYTHING = {"0": (0.01, 0.01, 0.01), "100": (1e4, 1e4, 1e4)}


def ct_phantom(shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return (1, X, Y, Z) HU: an elliptic body in air, organs in it as ellipsoids of one HU each, and noise."""
    random = np.random.default_rng(0)
    centres, radii = random.uniform(-0.6, 0.6, (ORGANS, 3)), random.uniform(0.05, 0.2, (ORGANS, 3))
    hu = random.uniform(-150, 250, ORGANS)
    x, y, z = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    body = (x[:, None] / 0.85) ** 2 + (y / 0.65) ** 2 < 1
    image = np.full((1, *shape), AIR_HU, np.float32)
    for k, height in enumerate(z):
        plane = np.full(shape[:2], TISSUE_HU, np.float32)
        for centre, radius, value in zip(centres, radii, hu, strict=True):
            a, b, c = ((at - m) / r for at, m, r in zip((x[:, None], y, height), centre, radius, strict=True))
            plane[a**2 + b**2 + c**2 < 1] = value
        noise = random.normal(0, 3, shape[:2]).astype(np.float32)
        image[0, :, :, k] = np.where(body, plane + noise, AIR_HU).round()
    return image


def grid(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Geometry:
    """Return a grid along the world's axes."""
    return Geometry(shape, np.diag([*spacing_mm, 1.0]))


def untrained_plan(
    classes: int, channel: str, normalisation: Normalisation, spacing_mm: tuple[float, float, float], **changes: Any
) -> Plan:
    """Return a plan of one channel that keeps the whole volume; `changes` are any other of its values."""
    return Plan(
        channels={channel: channel},
        labels={"background": 0, **{f"organ_{index}": index for index in range(1, classes)}},
        orientation="RAS",
        spacing_mm=spacing_mm,
        crop="none",
        patch_size=(96, 96, 96),
        batch_size=2,
        normalisation={channel: normalisation},
    ).changed(**changes)


def ct_plan(classes: int, spacing_mm: tuple[float, float, float], patch: int = 96) -> Plan:
    """Return a plan for CT with cubic patches."""
    scheme = Normalisation(scheme="ct", low=-200.0, high=300.0, mean=50.0, std=100.0)
    return untrained_plan(classes, "CT", scheme, spacing_mm, patch_size=(patch,) * 3)


@torch.no_grad()
def label_by_intensity(network: UNet) -> None:
    """Make the labels of a network of random weights as large as organs, for an argmax of noise is none to resample.

    The finest level carries the blurred image in its first feature map, and the head takes a class for a level of it.
    """
    skipped = network.decoder[-1][0][0].in_channels // 2
    finest = [block for stage in (network.encoder[0], network.decoder[-1]) for block in stage]
    for (conv, norm, _), source, blurs in zip(finest, (0, 0, skipped, 0), (True, True, False, False), strict=True):
        kernel = conv.weight[0].zero_()[source]
        if blurs:
            kernel += 1 / kernel.numel()
        else:
            kernel[tuple(n // 2 for n in kernel.shape)] = 1
        norm.bias[0] = 4  # so that the activation leaves it alone
    head = network.heads[-1]
    levels = torch.linspace(-2.5, 2.5, min(LEVELS, head.out_channels))
    classes = torch.linspace(0, head.out_channels - 1, len(levels)).round().long()
    head.weight.zero_()
    head.bias.fill_(-30)
    # The largest of -4 (feature - 4 - level)^2, less what all classes share.
    head.weight[classes, 0, 0, 0, 0] = 8 * levels
    head.bias[classes] = -4 * levels**2 - 32 * levels


def untrained_model(plan: Plan, options: Mapping[str, Any]) -> Model:
    """Return a model with a `unet` of random weights, always the same, that labels by intensity."""
    torch.manual_seed(0)
    section = NetworkSection(name="unet", options=dict(options))
    plan = fitted_plan(plan, section)
    channel = ChannelFingerprint(mean=0.0, std=1.0, percentiles={}, case_medians=(-1e9, 1e9), zero_share=0.0)
    fingerprint = Fingerprint(
        cases=1,
        spacing_mm=ANYTHING,
        shape=ANYTHING,
        extent_mm=ANYTHING,
        channels=dict.fromkeys(plan.channels, channel),
        label_voxels={},
        label_cases={},
        label_volume_ml={},
    )
    description = ModelDescription(
        name="benchmark",
        network=section,
        in_channels=len(plan.channels),
        num_classes=len(plan.labels),
        precision="auto",
        inference=InferenceSection(),
        manifest_name="none",
        manifest_digest="0" * 64,
        fold=None,
        step=0,
        scores={},
        versions={},
        created="",
    )
    network = network_for(plan, section).eval()
    assert isinstance(network, UNet)
    label_by_intensity(network)
    return Model(description, network, plan, fingerprint, "")


def save_untrained(folder: Path, plan: Plan, options: Mapping[str, Any]) -> Model:
    """Write the folder of a model with random weights."""
    model = untrained_model(plan, options)
    save_model(folder, model)
    return model
