"""How busy a GPU is while something runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def utilisation(device: torch.device) -> Iterator[list[int]]:
    """Collect a GPU's utilisation in percent ten times a second; nothing where nvidia-ml-py or the GPU is missing."""
    found: list[int] = []
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    except Exception:  # of several kinds, by what is missing
        yield found
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            found.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
