"""A peer's augmentation, patch by patch on one thread, as its loader does it; benchmarks/augmentation.py runs it.

    .peers/nnunet/bin/python benchmarks/peers/augment.py nnunet|monai X Y Z BATCH

Prints "ready"; then, for each line with a number of batches on its standard input, the seconds that they took, in CPU
time. nnunet: the transforms of its trainer, on patches of the size that its loader cuts out. monai: a chain of its
dictionary transforms, with medseg's ranges and default probabilities.
"""

import math
import sys
import time
from collections.abc import Callable

import torch

# PyPI's torchvision does not match the CPU torch, and imports only where the operators it looks for are declared.
TORCHVISION = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

Transform = Callable[[], object]


def patch(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and a label of two boxes."""
    label = torch.zeros(1, *size, dtype=torch.int16)
    x, y, z = (n // 4 for n in size)
    label[:, x : 2 * x, y : 3 * y, z : 3 * z], label[:, 2 * x : 3 * x, y : 3 * y, z : 3 * z] = 1, 2
    return torch.randn(1, *size), label


def nnunet(size: tuple[int, ...]) -> Transform:
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    angle = math.radians(30)
    transforms = nnUNetTrainer.get_training_transforms(size, (-angle, angle), None, (0, 1, 2), False)
    image, label = patch(tuple(get_patch_size(size, *[(-angle, angle)] * 3, (0.85, 1.25)).tolist()))
    return lambda: transforms(image=image.clone(), segmentation=label.clone())


def monai(size: tuple[int, ...]) -> Transform:
    from monai import transforms as m

    keys, angle = ["image", "label"], math.radians(15)
    modes = {"keys": keys, "mode": ["bilinear", "nearest"], "padding_mode": "zeros"}
    affine = {"rotate_range": [angle] * 3, "scale_range": [0.18] * 3, "translate_range": [2] * 3}
    chain = m.Compose(
        [
            m.RandAffined(prob=0.5, **affine, **modes),
            m.Rand3DElasticd(prob=0.2, sigma_range=(4, 6), magnitude_range=(50, 100), **modes),
            m.CenterSpatialCropd(keys, size),
            m.RandGaussianNoised("image", prob=0.15, std=0.15),
            m.RandGaussianSmoothd("image", prob=0.1, sigma_x=(0.5, 1), sigma_y=(0.5, 1), sigma_z=(0.5, 1)),
            m.RandScaleIntensityd("image", prob=0.15, factors=0.25),
            m.RandScaleIntensityFixedMeand("image", prob=0.15, factors=0.25, preserve_range=True),
            m.RandSimulateLowResolutiond("image", prob=0.1, zoom_range=(0.5, 1.0)),
            m.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
        ]
    )
    image, label = patch(tuple(round(1.2 * n) for n in size))
    return lambda: chain({"image": image.clone(), "label": label.clone()})


def main() -> None:
    peer, (*size, batch) = sys.argv[1], map(int, sys.argv[2:])
    torch.set_num_threads(1)
    transform = {"nnunet": nnunet, "monai": monai}[peer](tuple(size))
    transform()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.process_time()
        for _ in range(int(line) * batch):
            transform()
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()
