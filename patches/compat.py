"""What differs between the supported transformers releases, and only that."""

from __future__ import annotations

from torch import nn
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_kvcache.spec import STATE

# releases that other libraries are compared under have no such layer, and can import us all the same
LINEAR = getattr(cache_utils, "LinearAttentionLayer", None)


def sliding_windows(model: nn.Module) -> tuple[int | None, ...]:
    """The attention window of every layer, None for full attention, `STATE` for a state in place of keys and values.

    Read off the cache that transformers itself would make: where a configuration says it has changed between releases.
    """
    windows: list[int | None] = []
    for index, layer in enumerate(DynamicCache(config=model.config).layers):
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is LINEAR:
            windows.append(STATE)
        else:
            raise NotImplementedError(
                f"layer {index} of {type(model).__name__} keeps its state in a {type(layer).__name__}; "
                "only layers with full or sliding-window attention, or one recurrent state, are supported"
            )
    return tuple(windows)


def reentrant_checkpointing(decoder: nn.Module) -> bool:
    """Whether gradient checkpointing is on in its reentrant form."""
    for module in decoder.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            return bool(getattr(function, "keywords", {}).get("use_reentrant", False))
    return False


def writes_checkpoints(model: nn.Module, is_main_process: bool) -> bool:
    """Whether `save_pretrained` with this argument writes files in this process; old releases ask nothing else."""
    return getattr(model, "should_save_on_this_rank", bool)(is_main_process)
