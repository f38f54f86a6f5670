"""MONAI's DynUNet by its published recipe for the Decathlon's task 4; benchmarks/peer_training.py calls it.

    .peers/nnunet/bin/python benchmarks/peers/dynunet_training.py FOLDER MINUTES SNAPSHOTS OUT

The recipe is that of MONAI's tutorials (modules/dynunet_pipeline, commands/task04): SGD with Nesterov momentum 0.99,
500 epochs at a learning rate of 0.1 and 50 at 0.001, here the same shares of the steps that fill the budget; batch 9 of
40x56x40, Dice with cross-entropy on one coarser output too, gradients clipped at 12; zoom, noise, smoothing, intensity
and flips; prediction with all eight flips. FOLDER/cases.json names the fold's cases.
"""

import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandZoomd,
    SpatialPadd,
)
from snapshots import Snapshots, steps_within
from torch import Tensor

PATCH, BATCH, WORKERS = (40, 56, 40), 9, 2
FIRST_RATE, LAST_RATE, FIRST_SHARE = 1e-1, 1e-3, 500 / 550
BOTH = ["image", "label"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loaded(keys: list[str]) -> list[Any]:
    """Return what reads and normalises a case."""
    return [
        LoadImaged(keys),
        EnsureChannelFirstd(keys),
        NormalizeIntensityd(["image"], nonzero=True, channel_wise=True),
    ]


def changes(positive: int) -> list[Any]:
    """Return the recipe's random changes; positive crops are so many to one elsewhere."""
    sigma = (0.5, 1.15)
    return [
        SpatialPadd(BOTH, spatial_size=PATCH),
        RandCropByPosNegLabeld(
            BOTH, "label", PATCH, pos=positive, neg=1, num_samples=1, image_key="image", image_threshold=0
        ),
        RandZoomd(
            BOTH, min_zoom=0.9, max_zoom=1.2, mode=("trilinear", "nearest"), align_corners=(True, None), prob=0.15
        ),
        RandGaussianNoised(["image"], std=0.01, prob=0.15),
        RandGaussianSmoothd(["image"], sigma_x=sigma, sigma_y=sigma, sigma_z=sigma, prob=0.15),
        RandScaleIntensityd(["image"], factors=0.3, prob=0.15),
        *(RandFlipd(BOTH, spatial_axis=[axis], prob=0.5) for axis in range(3)),
    ]


def batches(cases: list[dict[str, str]], positive: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches for ever."""
    dataset = CacheDataset(cases, Compose([*loaded(BOTH), *changes(positive)]), progress=False)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=WORKERS)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def new_network(classes: int) -> DynUNet:
    """Build the network that the pipeline makes for the patch: halved while an axis has 8 voxels or more."""
    return DynUNet(
        3,
        1,
        classes,
        kernel_size=[3] * 4,
        strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2],
        norm_name="instance",
        deep_supervision=True,
        deep_supr_num=1,
    )


class Training:
    """The recipe's steps: with much foreground at first, with a small rate and less of it at last."""

    def __init__(self, cases: dict[str, Any]) -> None:
        self.network = new_network(len(cases["labels"])).to(DEVICE).train()
        self.optimiser = torch.optim.SGD(
            self.network.parameters(), FIRST_RATE, momentum=0.99, weight_decay=3e-5, nesterov=True
        )
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True)
        self.cases = cases["training"]
        self.batches = batches(self.cases, positive=2)

    def step(self) -> None:
        """Do one step."""
        batch = next(self.batches)
        image, label = (batch[key].as_tensor().to(DEVICE) for key in BOTH)
        self.optimiser.zero_grad()
        outputs = self.network(image).unbind(1)
        sum(0.5**level * self.loss(output, label) for level, output in enumerate(outputs)).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.optimiser.step()

    def run(self, minutes: float, count: int, folder: Path) -> Snapshots:
        """Train for as many steps as fill the minutes, and keep weights on the way."""
        steps = steps_within(minutes, self.network, self.optimiser, self.step)
        snapshots = Snapshots(folder, steps, count)
        for number in range(steps):
            if number == round(FIRST_SHARE * steps):
                self.finetune()
            self.step()
            snapshots.stepped(self.network)
        return snapshots

    def finetune(self) -> None:
        """Begin the recipe's second part, a run of its own there: another rate, sampler and momentum from nothing."""
        self.batches = batches(self.cases, positive=1)
        self.optimiser.state.clear()
        for group in self.optimiser.param_groups:
            group["lr"] = LAST_RATE


@torch.inference_mode()
def predicted(network: DynUNet, image: Tensor) -> Tensor:
    """Return the classes (X, Y, Z) of an image (1, 1, X, Y, Z), averaged over all flips."""
    total = torch.zeros(())
    for flips in itertools.chain.from_iterable(itertools.combinations((2, 3, 4), n) for n in range(4)):
        logits = sliding_window_inference(image.flip(flips), PATCH, 4, network, overlap=0.5, mode="gaussian")
        total = total + logits.softmax(1).flip(flips).cpu()
    return total[0].argmax(0)


def main() -> None:
    folder, minutes, count, out = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cases = json.loads((folder / "cases.json").read_text())
    for case in (*cases["training"], *cases["validation"]):
        (case["image"],) = case["images"]  # the recipe's images have one channel
    training = Training(cases)
    snapshots = training.run(minutes, count, out)
    network, read = training.network.eval(), Compose(loaded(["image"]))

    def predict(weights: Path, folder: Path) -> None:
        network.load_state_dict(torch.load(weights, weights_only=True))
        for case in cases["validation"]:
            image = read({"image": case["image"]})["image"].as_tensor()[None].to(DEVICE)
            classes = predicted(network, image).numpy().astype(np.uint8)
            affine = nibabel.load(case["image"]).affine
            nibabel.save(nibabel.Nifti1Image(classes, affine), folder / f"{case['id']}.nii.gz")

    snapshots.write(predict)


if __name__ == "__main__":
    main()
