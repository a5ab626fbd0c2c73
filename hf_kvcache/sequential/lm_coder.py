"""Coding token ids under the model's own distribution: the bound of the paper, met to a fraction of a percent.

Both directions run the model one token at a time through a plain cache, so that every probability is computed by the
same operations on the same shapes; a range coder (`constriction`) then spends -log2 P(token) bits a token. Floating
point makes this fragile: another machine, another number of threads or another batch rounds differently, and one wrong
probability garbles all that follows. So what is coded is decoded once more, and only what comes back is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_kvcache.devices import input_device


@dataclass(frozen=True)
class CodedTokens:
    """Rows of tokens, coded.

    Args:
        rows: bytes of every row.
        length: tokens of every row.
        surprisal: bits a token that the model's probabilities amount to, over all rows.
    """

    rows: tuple[bytes, ...]
    length: int
    surprisal: float

    @property
    def bits(self) -> float:
        """Bits a token that the bytes amount to."""
        return 8 * sum(map(len, self.rows)) / (self.length * len(self.rows))


def constriction() -> Any:
    """The module, or an error that names the package."""
    try:
        import constriction as module
    except ImportError:
        raise ModuleNotFoundError("coder='lm' needs constriction; pip install constriction") from None
    return module


@torch.no_grad()
def encode(model: Any, ids: Tensor) -> CodedTokens:
    """Codes ids `[B, T]`; the first token of a row, which nothing predicts, is one of V equally likely ones."""
    stream = constriction().stream
    coders = [stream.queue.RangeEncoder() for _ in ids]
    total = 0.0

    def choose(place: int, probabilities: np.ndarray) -> np.ndarray:
        nonlocal total
        chosen = ids[:, place].cpu().numpy().astype(np.int32)
        for coder, symbol, row in zip(coders, chosen, probabilities, strict=True):
            coder.encode(int(symbol), stream.model.Categorical(row, perfect=False, lazy=True))
            total -= math.log2(max(float(row[symbol]), 1e-38))
        return chosen

    _run(model, ids.shape, choose)
    rows = tuple(coder.get_compressed().astype("<u4").tobytes() for coder in coders)
    return CodedTokens(rows, ids.shape[1], total / ids.numel())


@torch.no_grad()
def decode(model: Any, coded: CodedTokens) -> Tensor:
    """The inverse of `encode`, on the same machine: `[B, T]`."""
    stream = constriction().stream
    coders = [stream.queue.RangeDecoder(np.frombuffer(row, dtype="<u4").astype(np.uint32)) for row in coded.rows]
    found = []

    def choose(place: int, probabilities: np.ndarray) -> np.ndarray:
        symbols = [
            coder.decode(stream.model.Categorical(row, perfect=False, lazy=True))
            for coder, row in zip(coders, probabilities, strict=True)
        ]
        found.append(np.array(symbols, dtype=np.int64))
        return found[-1]

    _run(model, (len(coded.rows), coded.length), choose)
    return torch.from_numpy(np.stack(found, axis=1))


def _run(model: Any, shape: Any, choose: Callable[[int, np.ndarray], np.ndarray]) -> None:
    """Steps through a text `[B, T]`: hands out probabilities `[B, V]` of the next tokens, takes the tokens."""
    batch, length = shape
    vocabulary = model.config.get_text_config().vocab_size
    probabilities = np.full((batch, vocabulary), 1 / vocabulary, dtype=np.float32)
    cache = None
    for place in range(length):
        tokens = torch.from_numpy(np.asarray(choose(place, probabilities), dtype=np.int64))[:, None]
        if place + 1 < length:
            out = model(input_ids=tokens.to(input_device(model)), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            probabilities = out.logits[:, -1].float().softmax(-1).cpu().numpy()
