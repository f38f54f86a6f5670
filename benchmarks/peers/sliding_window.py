"""One sliding window of a peer, as it comes: MONAI's `sliding_window_inference` or nnU-Net's
`predict_sliding_window_return_logits`, Gaussian, overlap 0.5, no mirroring; benchmarks/engine.py runs it.

    .peers/nnunet/bin/python benchmarks/peers/sliding_window.py FOLDER monai|nnunet X Y Z   # the window

Reads FOLDER/image.npy (C, X, Y, Z) and the network (plain_unet.py), writes FOLDER/PEER.npy, the labels, and prints the
seconds of the one call, after a first forward pass, as JSON.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from plain_unet import largest_difference, load_plain_unet
from torch import Tensor, nn

Size = tuple[int, int, int]


def monai(network: nn.Module, image: Tensor, window: Size) -> Tensor:
    from monai.inferers.utils import sliding_window_inference

    with torch.inference_mode():
        return sliding_window_inference(image[None], window, 1, network, overlap=0.5, mode="gaussian")[0]


def nnunet(network: nn.Module, image: Tensor, window: Size) -> Tensor:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(0.5, use_gaussian=True, use_mirroring=False, device=image.device, allow_tqdm=False)
    predictor.network = network
    predictor.configuration_manager = SimpleNamespace(patch_size=window)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=network.decoder.num_classes)
    return predictor.predict_sliding_window_return_logits(image)


def main() -> None:
    folder, peer, window = Path(sys.argv[1]), sys.argv[2], tuple(int(n) for n in sys.argv[3:6])
    network, image = load_plain_unet(folder), torch.from_numpy(np.load(folder / "image.npy"))
    slide = {"monai": monai, "nnunet": nnunet}[peer]
    differs = largest_difference(network, folder)
    slide(network, torch.zeros(len(image), *window), window)  # imports, and a first forward pass
    start = time.perf_counter()
    logits = slide(network, image, window)
    seconds = time.perf_counter() - start
    # Plane by plane: an argmax of all at once is 64-bit integers, and the peak is to be the peer's own.
    np.save(folder / f"{peer}.npy", np.stack([plane.argmax(0).to(torch.uint8).numpy() for plane in logits.unbind(1)]))
    print(json.dumps({"seconds": seconds, "logits_differ_by": differs}))


if __name__ == "__main__":
    main()
