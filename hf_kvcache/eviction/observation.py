"""`Observation`: what an eviction method may look at when it decides which tokens of a layer to keep.

Every query head that reads a KV head is a member of its group; when several layers share the KV of one (KVSharer,
YOCO), the query heads of all of them are. Methods that average or maximise over the group so serve shared layers
unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_kvcache.kernels.library import at_once
from hf_kvcache.kernels.window_scores import causal_logits, window_scores

# scores of at most so many (query, key) pairs are in memory at once
PAIRS_AT_ONCE = 1 << 22
# the same on a GPU, which a launch of so few would leave idle
GPU_PAIRS_AT_ONCE = 1 << 26


class Rotation(Protocol):
    """The rotary embedding of one layer."""

    def __call__(self, vectors: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
        """Vectors `[..., P, D]` before RoPE at positions `[P]` as they are after it; `inverse` is the way back."""
        ...

    def mean(self, positions: Tensor) -> Tensor:
        """The mean over positions `[P]` of the matrices `[D, D]` by which RoPE multiplies row vectors."""
        ...


@dataclass(frozen=True)
class Reading:
    """How one layer read the KV: the part of an observation that differs between layers that share.

    Args:
        query: its last queries, after RoPE, `[B, H_q, W, D]`; None when the method wants none.
        output: the module that projects its heads to the residual stream.
        rotate: its rotary embedding; None unless the method asks for it (`Scorer.rotates`).
    """

    query: Tensor | None
    output: nn.Module
    rotate: Rotation | None = None


@dataclass(frozen=True)
class Observation:
    """The KV of one layer, and how it was read.

    Args:
        key, value: `[B, H_kv, T, D]`, keys after RoPE.
        readings: one for every layer that reads this KV.
        scale: factor of the attention scores.
        softcap: their tanh cap, 0 for none.
        layer: the place of this layer among those that evict, and `num_layers`, how many these are.
        readers: for every layer that evicts, the layers of the model that read its KV, itself first.
        tokens: of every row, how many were processed so far, dropped ones included; None when none was dropped.
        positions: `[B, H_kv, T]`, the place of every token in its sequence; None when they are 0 .. T - 1.
        valid: `[B, H_kv, T]`, False where an earlier eviction left no entry; None when all are there.
        carried: what the scorer remembered of every token, `[B, H_kv, T]` by name (see `Scorer.carried`).
        replayed: `[B, H_kv, T]`, the highest attention that each token got while the context was read again (see
            `Scorer.passes`); None when it was not.
    """

    key: Tensor
    value: Tensor
    readings: Sequence[Reading]
    scale: float
    softcap: float = 0.0
    layer: int = 0
    num_layers: int = 1
    readers: tuple[tuple[int, ...], ...] = ((0,),)
    tokens: int | None = None
    positions: Tensor | None = None
    valid: Tensor | None = None
    carried: dict[str, Tensor] | None = None
    replayed: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.key.shape[2]

    @property
    def seen(self) -> int:
        """Tokens of every row processed so far, dropped ones included."""
        return self.tokens or self.num_tokens

    @cached_property
    def places(self) -> Tensor:
        """The place of every token in its sequence, `[B, H_kv, T]`; of no meaning where `valid` is False."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.num_tokens, device=self.key.device).expand(self.key.shape[:3])

    @cached_property
    def query(self) -> Tensor:
        """The last queries of every group, `[B, H_kv, G, W, D]`, in float32."""
        heads = self.key.shape[1]
        queries = [reading.query for reading in self.readings if reading.query is not None]
        if not queries:
            raise ValueError("this eviction method looks at queries, but none were recorded; set `queries` on it")
        return torch.cat([query.float().unflatten(1, (heads, -1)) for query in queries], dim=2)

    @cached_property
    def output(self) -> Tensor:
        """W_O: what each query head adds to the residual stream, `[H_kv, G, D, hidden]`, in float32."""
        heads, dim = self.value.shape[1], self.value.shape[3]
        parts = [
            output_weight(reading.output, self.value.device).unflatten(0, (heads, -1, dim)) for reading in self.readings
        ]
        return torch.cat(parts, dim=1)

    def attention(self, last: int | None = None) -> Tensor:
        """Causal attention weights of the last queries over all tokens, `[B, H_kv, G, W, T]`, in float32.

        Args:
            last: how many of the recorded queries to take; None for all.
        """
        return self.logits(last).softmax(-1)

    def window_scores(self, last: int) -> Tensor:
        """The mean of `attention(last)` over the queries, `[B, H_kv, G, T]`."""
        if self.valid is not None:
            return self.attention(last).mean(dim=3)
        query = self.query[..., -last:, :].to(self.key.dtype)
        return window_scores(query, self.key, scale=self.scale, softcap=self.softcap)

    def logits(self, last: int | None = None) -> Tensor:
        """What `attention` is the softmax of: scaled, capped, and the lowest number where nothing is seen."""
        query = self.query if last is None else self.query[..., -last:, :]
        return self._logits(query, self.num_tokens - query.shape[3])

    def attention_chunks(self) -> Iterator[Tensor]:
        """`attention()` in parts along W, so that a long prompt does not need all of it at once."""
        batch, heads, group, length, _ = self.query.shape
        step = rows_at_once(self.key.device, batch * heads * group * self.num_tokens)
        # of a long prompt in 16 bits, converting all keys for every part would take longer than the products
        key = self.key.float()
        for start in range(0, length, step):
            query = self.query[..., start : start + step, :]
            yield self._logits(query, self.num_tokens - length + start, key).softmax(-1)

    def _logits(self, query: Tensor, first: int, key: Tensor | None = None) -> Tensor:
        """Attention logits of queries `[B, H_kv, G, W, D]`, the first of which stands at column `first`.

        Args:
            query, first: as above.
            key: the keys in float32, where they were converted before.
        """
        scores = causal_logits(query, self.key if key is None else key, first, self.scale, self.softcap)
        if self.valid is not None:
            scores.masked_fill_(~self.valid[:, :, None, None], torch.finfo(scores.dtype).min)
        return scores


def rows_at_once(device: torch.device, pairs: int) -> int:
    """How many rows of so many (query, key) pairs to score at once."""
    return max(1, at_once(device, PAIRS_AT_ONCE, GPU_PAIRS_AT_ONCE) // pairs)


def output_weight(module: nn.Module, device: torch.device) -> Tensor:
    """The weight of a linear module as `[in, out]`, in float32.

    A module that is no plain Linear in memory (quantised, adapted, dispatched) is asked for the image of the unit
    vectors, which costs as much as projecting as many tokens as it has inputs.
    """
    weight = module.weight
    if type(module) is nn.Linear and weight.device.type != "meta":
        return weight.detach().to(device, torch.float32).T
    like = next((p for p in module.parameters() if p.is_floating_point() and p.device.type != "meta"), None)
    dtype, home = (like.dtype, like.device) if like is not None else (torch.float32, device)
    unit = torch.eye(module.in_features, dtype=dtype, device=home)
    image = module(unit) - module(torch.zeros_like(unit[:1]))
    return image.detach().to(device, torch.float32)
