"""Saving a cache as one safetensors file and reading it back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_kvcache import safefile
from hf_kvcache.fingerprint import matches

if TYPE_CHECKING:
    from hf_kvcache.cache import KVCache

FORMAT = "hf_kvcache.cache/1"
# of a prompt that has not come to its end, where it will be read again
PROMPT = ("prompt_ids", "prompt_positions")


def save_cache(cache: KVCache, path: str | Path) -> None:
    """Writes all layers of `cache`, its plan and the fingerprint of its model."""
    described = [layer.describe() for layer in cache.layers]
    # of keys as the model makes them; what is held beside them has dtypes of its own
    keys = (held[name] for _, held in described for name in held if name.split(".")[-1] in ("key", "keys"))
    dtypes = [tensor.dtype for tensor in keys]
    description = {
        "fingerprint": cache.spec.fingerprint,
        "source_layers": cache.spec.sharing.source_layers,
        "sliding_windows": cache.spec.sliding_windows,
        "dtype": str(dtypes[0] if dtypes else None),
        "layers": [description for description, _ in described],
    }
    tensors = {
        f"layers.{layer}.{name}": tensor.cpu()
        for layer, (_, held) in enumerate(described)
        for name, tensor in held.items()
    }
    prompt = cache.prompt_so_far()
    if prompt is not None:
        tensors |= {name: tensor.cpu() for name, tensor in zip(PROMPT, prompt, strict=True)}
    safefile.write(path, FORMAT, description, tensors)


def restore_cache(cache: KVCache, path: str | Path, devices: Sequence[torch.device], dtype: torch.dtype) -> KVCache:
    """Fills the empty `cache` from a file, layer i on `devices[i]`; raises for another model, plan or dtype."""
    description, tensors = safefile.read(path, FORMAT, "make one with KVCache.save")
    spec = cache.spec
    if not matches(description["fingerprint"], spec.fingerprint):
        raise ValueError(
            f"{path} is a cache of the model {description['fingerprint']}, this one is {spec.fingerprint}; "
            "load it for the model that made it"
        )
    for name, own in (("source_layers", spec.sharing.source_layers), ("sliding_windows", spec.sliding_windows)):
        if tuple(description[name]) != own:
            raise ValueError(
                f"{path} was made with {name} {tuple(description[name])}, this model is patched with {own}; "
                "patch it with the same plan"
            )
    if description["dtype"] not in (str(dtype), str(None)):
        raise ValueError(
            f"{path} is a cache of a model in {description['dtype']}, this one is in {dtype}; use one dtype"
        )
    for index, (layer, described) in enumerate(zip(cache.layers, description["layers"], strict=True)):
        prefix = f"layers.{index}."
        held = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        layer.restore(described, held, devices[index])
    if PROMPT[0] in tensors:
        cache.prompt_ids, cache.prompt_positions = (tensors[name].to(devices[0]) for name in PROMPT)
    return cache
