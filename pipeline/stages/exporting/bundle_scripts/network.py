"""The network as an exported program, with the weights of the bundle's model.pt."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn


class ExportedNetwork(nn.Module):
    """A network read from a `torch.export` program: no class of it is needed, nor any code but torch.

    Args:
        program: path of the .pt2 file.
        weights: path of the state dict.
        device: where it runs.
    """

    def __init__(self, program: str, weights: str, device: torch.device | str = "cpu") -> None:
        super().__init__()
        exported = torch.export.load(program)
        if torch.device(device).type != "cpu":
            from torch.export.passes import move_to_device_pass

            exported = move_to_device_pass(exported, str(device))
        self.module = exported.module()
        self.module.load_state_dict(torch.load(weights, map_location=device, weights_only=True))

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (N, C, X, Y, Z) to logits (N, K, X, Y, Z)."""
        logits: Tensor = self.module(torch.as_tensor(image))
        return logits

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, which the program was exported in and knows no other."""
        self.training = False
        return self
