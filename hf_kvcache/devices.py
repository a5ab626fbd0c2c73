"""Where a model takes its token ids, also one whose weights lie elsewhere and are brought in only to be used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def input_device(model: Any) -> torch.device:
    """The device that the input embedding of a model computes on."""
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    if device.type != "meta":
        return device
    # accelerate leaves no weight in the module; its hooks, on the embedding or around it, know where one is put
    return next((found for module in (embedding, *model.modules()) for found in _executing(module)), device)


def _executing(module: Any) -> Iterator[torch.device]:
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        device = getattr(one, "execution_device", None)
        if device is not None:
            yield torch.device(device)
