"""Randomness keyed by what is drawn: (seed, index) gives the same numbers whatever was drawn before, by whom, or after
which restart.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    """Return a numpy generator for one purpose ("patch", "augmentation") and index, independent of all others."""
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose), counter=[0, 0, 0, index]))


def torch_generator(seed: int, purpose: str, index: int, device: torch.device) -> torch.Generator:
    """Return a torch generator on the device for one purpose and index."""
    return torch.Generator(device).manual_seed(torch_seed(seed, purpose, index))


def torch_seed(seed: int, purpose: str, index: int) -> int:
    """Return a 63-bit seed for torch from seed, purpose and index."""
    return int(generator(seed, purpose, index).integers(2**63 - 1))


def _key(seed: int, purpose: str) -> int:
    """Return Philox's 128-bit key."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}".encode()).digest()[:16], "little")
