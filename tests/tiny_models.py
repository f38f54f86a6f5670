"""Models small enough for a test."""

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import InferenceSection, NetworkSection, Output
from pipeline.data.plan import ChannelFingerprint, Fingerprint, Normalisation, Plan
from pipeline.model import Model, ModelDescription
from pipeline.networks import Network, NetworkTask, build_network
from pipeline.networks.fitting import outputs_of

UNET = NetworkSection(name="unet", options={"width": 4, "levels": 2, "norm": "batch"})
# A name that a test adds to NETWORKS with `nearest_mean`.
NEAREST_MEAN = NetworkSection(name="nearest_mean")


class NearestMean(Network):
    """Gives each voxel the class whose mean intensity is nearest: a linear rule of one voxel."""

    def __init__(self, *means: float) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(1, len(means), 1)
        values = torch.tensor(means)
        with torch.no_grad():
            self.convolution.weight[:, 0, 0, 0, 0] = values
            self.convolution.bias.copy_(-(values**2) / 2)  # type: ignore[union-attr]

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.convolution(image)
        return logits


def nearest_mean(task: NetworkTask) -> Network:
    """Build the hand-made network for intensities of 100 times the class index, as an entry of NETWORKS."""
    return NearestMean(*(100.0 * index for index in range(task.num_classes)))


def make_plan(**changes: object) -> Plan:
    """Make a plan of one MR channel and two paired structures."""
    plan = Plan(
        channels={"T1": "MR"},
        labels={"background": 0, "left": 1, "right": 7},
        label_pairs=(("left", "right"),),
        orientation="RAS",
        spacing_mm=(1.0, 1.0, 1.0),
        crop="none",
        patch_size=(16, 16, 8),
        batch_size=2,
        normalisation={"T1": Normalisation(scheme="none")},
        reasons={"spacing_mm": "the median: over 8 cases", "patch_size": "what fits"},
    )
    return plan.changed(**changes)


def make_fingerprint(channels: tuple[str, ...] = ("T1",)) -> Fingerprint:
    """Make the fingerprint of 8 cases of about 1 mm, 20 to 60 mm wide, with medians from 50 to 250."""
    channel = ChannelFingerprint(
        mean=150.0, std=50.0, percentiles={"50": 150.0}, case_medians=(50.0, 250.0), zero_share=0.0
    )
    return Fingerprint(
        cases=8,
        spacing_mm={"0": (0.9, 0.9, 0.9), "50": (1.0, 1.0, 1.0), "100": (1.2, 1.2, 1.2)},
        shape={"0": (20.0, 20.0, 20.0), "50": (40.0, 40.0, 40.0), "100": (60.0, 60.0, 60.0)},
        extent_mm={"0": (20.0, 20.0, 20.0), "50": (40.0, 40.0, 40.0), "100": (60.0, 60.0, 60.0)},
        channels=dict.fromkeys(channels, channel),
        label_voxels={"left": 100, "right": 90},
        label_cases={"left": 8, "right": 8},
        label_volume_ml={"left": (0.1, 0.2, 0.3), "right": (0.1, 0.2, 0.3)},
    )


def make_model(
    seed: int = 0,
    plan: Plan | None = None,
    network: NetworkSection = UNET,
    inference: InferenceSection | None = None,
    output: Output = "softmax",
) -> Model:
    """Make a model with random weights, or with those of the hand-made network."""
    torch.manual_seed(seed)
    plan = plan or make_plan()
    outputs = outputs_of("segment", plan, output)
    description = ModelDescription(
        name="tiny",
        network=network,
        in_channels=len(plan.channels),
        num_classes=outputs,
        output=output,
        precision="fp32",
        inference=inference or InferenceSection(),
        manifest_name="phantoms",
        manifest_digest="0" * 64,
        fold=2,
        step=300,
        scores={"dice/left": 0.875},
        versions={"torch": torch.__version__, "numpy": np.__version__},
        created="2026-11-20T10:00:00+00:00",
    )
    task = NetworkTask(len(plan.channels), outputs, patch_size=plan.patch_size, spacing_mm=plan.spacing_mm)
    built = build_network(network.name, network.options, task).eval()
    return Model(description, built, plan, make_fingerprint(tuple(plan.channels)), "name: tiny\n# a comment, ü\n")
