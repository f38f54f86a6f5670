"""How busy a GPU is while something runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def utilisation(device: torch.device) -> Iterator[list[int]]:
    """Collect a GPU's utilisation in percent ten times a second; nothing of a CPU, or where nvidia-ml-py is missing."""
    found: list[int] = []
    percent = _percent_of(device)
    if percent is None:
        yield found
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            found.append(percent())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def _percent_of(device: torch.device) -> Callable[[], int] | None:
    """Return what reads a GPU's utilisation now; None where nothing does."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    except Exception:  # of several kinds, by what is missing
        return None
    return lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
