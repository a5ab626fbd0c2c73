"""A configuration of its own for a patched model, and what becomes of it afterwards.

Models that are built from one object share it, so our attention's name must not be written into it.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

# what the patch itself writes, and takes back
OURS = "_attn_implementation_internal"


def swap_config(model: nn.Module, old: Any, new: Any) -> None:
    """Replaces a configuration object in all modules."""
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new


def carry_over(config: PreTrainedConfig, before: PreTrainedConfig, original: PreTrainedConfig) -> None:
    """Writes into `original` what was changed in `config` since it was copied to `before`, but for the attention.

    The user and transformers (`resize_token_embeddings`) change the configuration that a model has, whoever made it.
    """
    for name, value in vars(config).items():
        then = vars(before).get(name)
        if name == OURS or (name in vars(before) and then == value):
            continue
        own = vars(original).get(name)
        if all(isinstance(part, PreTrainedConfig) for part in (value, then, own)):
            carry_over(value, then, own)
        else:
            vars(original)[name] = copy.deepcopy(value)
