"""NETWORKS: every network by its name in the YAML. A new one is a file in this folder and a line in the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline import options as _options
from pipeline.networks.autoencoder import autoencoder
from pipeline.networks.contract import Network, NetworkTask
from pipeline.networks.fcn import fcn, simple_fcn
from pipeline.networks.monai_networks import (
    attention_unet,
    basic_unet_plus_plus,
    dynunet,
    mednext,
    segresnet,
    swin_unetr,
    unetr,
)
from pipeline.networks.multiscale_pathways import multiscale_pathways
from pipeline.networks.multiscale_unet import multiscale_unet
from pipeline.networks.patch_classifier import patch_classifier
from pipeline.networks.residual_encoder import residual_encoder_unet
from pipeline.networks.unet import simple_unet, unet

__all__ = ["NETWORKS", "Network", "NetworkTask", "build_network", "check_options"]

NETWORKS: dict[str, Callable[..., Network]] = {
    "patch_classifier": patch_classifier,
    "fcn": fcn,
    "simple_fcn": simple_fcn,
    "unet": unet,
    "simple_unet": simple_unet,
    "residual_encoder_unet": residual_encoder_unet,
    "autoencoder": autoencoder,
    "multiscale_pathways": multiscale_pathways,
    "multiscale_unet": multiscale_unet,
    "dynunet": dynunet,
    "segresnet": segresnet,
    "attention_unet": attention_unet,
    "basic_unet_plus_plus": basic_unet_plus_plus,
    "mednext": mednext,
    "unetr": unetr,
    "swin_unetr": swin_unetr,
}


def build_network(name: str, options: Mapping[str, Any], task: NetworkTask) -> Network:
    """Build a network of the table with random weights.

    Args:
        name: its name in NETWORKS.
        options: the builder's keyword arguments; what is left out has its default.
        task: channels, classes, patch and spacing.

    Raises:
        ValueError: the name or an option is wrong, or the network does not fit the task.
    """
    checked = _options.validated_options(NETWORKS, name, options)
    return NETWORKS[name](task, **checked)


def check_options(name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every problem of a network's name and options as (key, message), before anything is built."""
    return _options.check_options(NETWORKS, name, options)
