"""`Page`: the keys and values of some consecutive tokens, and the interface of what codes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

# producer, vectors [..., P, D] after RoPE, positions [P], inverse -> vectors before RoPE, or the other way round
Rotate = Callable[[int, Tensor, Tensor, bool], Tensor]

DTYPES = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16}

# tokens that no page has
UNLIMITED = 1 << 31


@dataclass(frozen=True)
class Geometry:
    """The shape of one token's keys and values.

    Args:
        producers: the layers that store, in order.
        heads: for each of them, KV heads.
        dims: for each of them, the head dimension.
        dtype: of keys and values.
    """

    producers: tuple[int, ...]
    heads: tuple[int, ...]
    dims: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """Numbers a token, keys and values together."""
        return 2 * sum(heads * dim for heads, dim in zip(self.heads, self.dims, strict=True))

    def widths(self, members: Sequence[int]) -> list[int]:
        """Channels of some producers, counted from 0: heads x dimension of each."""
        return [self.heads[member] * self.dims[member] for member in members]

    @property
    def token_bytes(self) -> int:
        """Bytes a token as the model holds it."""
        return self.numbers * torch.finfo(self.dtype).bits // 8

    def split(self, flat: Tensor, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values `[H, n, D]` of every producer from one flat tensor, layer after layer, key then value."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        start = 0
        for heads, dim in zip(self.heads, self.dims, strict=True):
            for part in (keys, values):
                size = heads * tokens * dim
                part.append(flat[start : start + size].view(heads, tokens, dim))
                start += size
        return keys, values


@dataclass(frozen=True)
class Page:
    """Some consecutive tokens of a sequence.

    Args:
        ids: token ids `[n]`.
        start: the position of the first.
        keys, values: `[H_kv, n, D]` of every producer, after RoPE; empty when only the tokens are known.
    """

    ids: np.ndarray
    start: int
    keys: Sequence[Tensor] = ()
    values: Sequence[Tensor] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, tokens: int) -> Page:
        """The page of the first tokens."""
        if tokens == len(self):
            return self
        keys, values = ([tensor[:, :tokens] for tensor in part] for part in (self.keys, self.values))
        return Page(self.ids[:tokens], self.start, keys, values)

    def flat(self) -> Tensor:
        """All numbers `[N]`, as `Geometry.split` takes them apart."""
        pairs = zip(self.keys, self.values, strict=True)
        return torch.cat([tensor.reshape(-1) for pair in pairs for tensor in pair])


@dataclass(frozen=True)
class Context:
    """What a codec may use beside the page.

    Args:
        geometry: of the cache.
        rotate: applies and undoes RoPE; None where the caller has no model at hand.
        prefill_seconds: a token, measured; 0 when nothing is known.
        bandwidth: of the place of pages, bytes a second, measured; 0 when nothing is known.
    """

    geometry: Geometry
    rotate: Rotate | None = None
    prefill_seconds: float = 0.0
    bandwidth: float = 0.0


@dataclass(frozen=True)
class Coded:
    """A page as its codec leaves it: JSON-able facts, and bytes by name."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, bytes | memoryview] = field(default_factory=dict)


class PageCodec(Protocol):
    """How a page is coded. A frozen value.

    Attributes:
        name: in page files.
        identity: name and the options that change what is restored; part of every key.
        restores: whether decoding gives keys and values; otherwise they are computed again from the tokens.
        repeatable: tokens of the longest page of which a part may become part of another page: what comes back of it
            does not change when it is coded once more.
    """

    name: ClassVar[str]
    restores: ClassVar[bool]

    @property
    def repeatable(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def encode(self, page: Page, context: Context) -> Coded: ...

    def decode(self, coded: Coded, ids: np.ndarray, start: int, context: Context) -> Page:
        """The page of tokens `ids` that begin at position `start`.

        Raises:
            PageError: when what is coded does not fit.
        """
        ...
