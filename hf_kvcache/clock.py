"""The time when devices have done what they were asked."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch


def now(devices: Iterable[torch.device]) -> float:
    """Seconds, once these devices are done: on CUDA a call returns before its kernels have run."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter()
