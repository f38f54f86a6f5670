"""Narrow variants of every network: what holds for them does not depend on the width."""

from typing import Any

from pipeline.networks import NetworkTask

Options = dict[str, Any]

TASK = NetworkTask(in_channels=2, num_classes=3, patch_size=(16, 24, 16), spacing_mm=(1.0, 1.0, 1.0))
FLAT_TASK = NetworkTask(2, 3, patch_size=(32, 24, 1), spacing_mm=(1.0, 1.0, 4.0), flat_axis=2)

# Name in the table -> options, one entry for each way in which the network takes another road.
VARIANTS: dict[str, list[Options]] = {
    "patch_classifier": [
        {"widths": [4, 6], "convs": 1, "hidden": [8]},
        {"widths": [4], "pooling": False, "seen": 1, "hidden": [], "norm": "none"},
    ],
    "fcn": [
        {"width": 4, "max_width": 8},
        {"width": 4, "stride": 32, "convs": 1, "norm": "instance", "upsampling": "linear"},
        {"width": 4, "stride": 4, "stages": 3, "head_width": 8, "head_kernel": 1, "norm": "none"},
        {"width": 4, "stride": 1, "stages": 2, "dropout": 0.2},
    ],
    "simple_fcn": [{"width": 4}],
    "unet": [
        {"width": 4},
        {"width": 4, "norm": "batch", "residual": True, "activation": "silu", "dropout": 0.3},
        {"width": 4, "norm": "none", "convs": 1, "activation": "prelu", "levels": 2},
        {"width": 4, "norm": "group", "downsampling": "max", "upsampling": "max_unpool", "skips": "sum"},
        {"widths": [4, 6], "norm": "batch", "downsampling": "average", "upsampling": "bed_of_nails", "skips": "none"},
        {"width": 4, "norm": "batch", "padding": "valid", "levels": 3, "residual": True, "upsampling": "linear"},
        {
            "strides": [[1, 2, 2]],
            "kernels": [[1, 3, 3], [3, 3, 3]],
            "convs": [1, 2],
            "width": 4,
            "norm": "none",
            "padding": "valid",
            "upsampling": "pixel_shuffle",
            "coarse_heads": False,
        },
    ],
    "simple_unet": [{"widths": [4, 6, 8]}, {"widths": [4, 6, 8], "padding": "valid"}],
    "residual_encoder_unet": [
        {"width": 4},
        {"widths": [4, 6], "blocks": [2, 1], "decoder_convs": 2, "norm": "batch", "upsampling": "linear"},
    ],
    "autoencoder": [{"width": 4, "norm": "batch"}],
    "multiscale_pathways": [
        {"feature_maps": [4, 4, 6, 6, 6, 6, 8, 8], "hidden": [8, 8]},
        {"size": "small", "feature_maps": [4, 6, 4], "residual_layers": [3], "hidden": [], "norm": "none"},
        {"factors": [], "feature_maps": [4, 4], "residual_layers": [], "hidden": [4]},
        {"factors": [2, [3, 2, 1]], "feature_maps": [4, 6], "residual_layers": [2], "hidden": [8]},
    ],
    "multiscale_unet": [
        {"width": 4},
        {
            "width": 4,
            "levels": 2,
            "convs": 1,
            "norm": "none",
            "residual": True,
            "downsampling": "average",
            "upsampling": "linear",
            "context_factor": 3,
            "context_width": 6,
        },
    ],
    "dynunet": [{"width": 4}, {"width": 4, "norm": "batch", "residual": True, "levels": 3}],
    "segresnet": [{"width": 8}, {"width": 8, "blocks_down": [1, 1], "blocks_up": [1], "dropout": 0.1}],
    "attention_unet": [{"width": 4}],
    "basic_unet_plus_plus": [{"width": 4}, {"width": 4, "norm": "batch", "dropout": 0.1}],
    "mednext": [{"width": 4, "blocks": [1, 1], "expansion": [1, 2], "bottleneck_blocks": 1}],
    "unetr": [{"width": 4, "hidden": 24, "mlp": 32, "heads": 2}],
    "swin_unetr": [
        {"width": 12, "depths": [2, 1, 1, 1], "window": 2},
        {"width": 12, "depths": [1, 1, 1, 1], "window": 2, "convolutions": True},
    ],
}

ALL = [(name, options) for name, several in VARIANTS.items() for options in several]
