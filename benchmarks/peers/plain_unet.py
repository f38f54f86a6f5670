"""medseg's `unet` as the peers' own class, nnU-Net's PlainConvUNet, with the same weights.

FOLDER/weights.safetensors holds the weights by their names in medseg, FOLDER/network.json the strides into each level;
`side_by_side.export_unet` writes both. Runs in the peers' environment (see nnunet.txt).
"""

import json
import re
from pathlib import Path

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from safetensors.torch import load_file
from torch import Tensor, nn

NAMES = [
    (r"^encoder\.(\d+)\.(\d+)\.", r"encoder.stages.\1.0.convs.\2."),
    (r"^decoder\.(\d+)\.(\d+)\.", r"decoder.stages.\1.convs.\2."),
    (r"^upsampling\.", "decoder.transpconvs."),
    (r"^heads\.", "decoder.seg_layers."),
    (r"(convs\.\d+)\.0\.", r"\1.conv."),
    (r"(convs\.\d+)\.1\.", r"\1.norm."),
]


def load_plain_unet(folder: Path) -> PlainConvUNet:
    """Build PlainConvUNet and load the weights; an option of `unet` that it lacks is an error, not another network."""
    weights = load_file(folder / "weights.safetensors")
    network = _untrained(weights, json.loads((folder / "network.json").read_text())["strides"])
    own = network.state_dict()
    for name, values in weights.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        own.pop(name).copy_(values)
    # What is left: second names of the same tensors, and biases before a norm, which subtracts them again.
    for name, values in own.items():
        if name.endswith(".conv.bias"):
            values.zero_()
        elif "all_modules" not in name and not name.startswith("decoder.encoder."):
            raise ValueError(f"medseg's network has no {name}: only a plain `unet` has the same class in nnU-Net")
    return network.eval()


def _untrained(weights: dict[str, Tensor], strides: list[list[int]]) -> PlainConvUNet:
    """Build the network that the weights' shapes speak of, with nnU-Net's usual options."""
    levels = len(strides) + 1
    first = [weights[f"encoder.{level}.0.0.weight"] for level in range(levels)]
    batch_norm = "encoder.0.0.1.running_mean" in weights
    return PlainConvUNet(
        input_channels=first[0].shape[1],
        n_stages=levels,
        features_per_stage=[len(kernel) for kernel in first],
        conv_op=nn.Conv3d,
        kernel_sizes=[list(kernel.shape[2:]) for kernel in first],
        strides=[[1, 1, 1], *strides],
        n_conv_per_stage=2,
        num_classes=len(weights[f"heads.{levels - 2}.weight"]),
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.BatchNorm3d if batch_norm else nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


@torch.inference_mode()
def largest_difference(network: nn.Module, folder: Path) -> float:
    """Return by how much its logits differ from medseg's on the probe that was handed over with the weights."""
    probe = load_file(folder / "probe.safetensors")
    return float((network(probe["image"]) - probe["logits"]).abs().max())
