"""How much information a text has under the model, token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


@torch.no_grad()
def token_bits(model: Any, ids: Tensor) -> np.ndarray:
    """-log2 P_M(token | all before it) of ids `[T]`; the first, which nothing predicts, counts log2 of the vocabulary.

    Example:
        >>> bits = token_bits(model, ids[0])
        >>> store.annotate(identity, ids[0], bits)  # I(page) of every page of this prompt
    """
    logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
    scores = logits[:-1].log_softmax(-1).gather(-1, ids[1:, None].to(logits.device))[:, 0]
    return np.concatenate([[math.log2(logits.shape[-1])], -scores.cpu().double().numpy() / math.log(2)])
