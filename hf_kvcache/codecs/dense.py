"""`DenseCodec`: keys and values as they are, in the model's dtype. The codec of `method=None`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.codecs.codec import Payload, join_entries, select_entries
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.library import has_kernel
from hf_kvcache.kernels.ragged_attention import ragged_decode_attention


@dataclass(frozen=True)
class DenseCodec:
    """Stores key and value unchanged; nothing is lost."""

    name: ClassVar[str] = "dense"
    lossy: ClassVar[bool] = False
    residual_length: ClassVar[int] = 0
    block: ClassVar[int] = 0

    def encode(self, key: Tensor, value: Tensor, owners: Tensor | None = None, like: Payload | None = None) -> Payload:
        return {"key": _own(key), "value": _own(value)}

    def decode(self, payload: Payload, owners: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return payload["key"], payload["value"]

    def attend(
        self,
        payload: Payload,
        start: int,
        shape: tuple[int, int, int],
        query: Tensor,
        scale: float,
        softcap: float,
        mask: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        (rows, heads, tokens), readers = shape, query.shape[1]
        entries = slice(start, start + rows * heads * tokens)
        key, value = (payload[name][entries].view(rows, heads, tokens, -1) for name in ("key", "value"))
        if readers != heads:
            key, value = key.expand(-1, readers, -1, -1), value.expand(-1, readers, -1, -1)
        return decode_attention(query, key, value, mask, scale=scale, softcap=softcap)

    def attends_runs(self, payload: Payload, query: Tensor) -> bool:
        return has_kernel("decode_attention", query, payload["key"], payload["value"])

    def attend_runs(
        self, payload: Payload, work: Tensor, parts: Tensor, query: Tensor, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        return ragged_decode_attention(
            query, payload["key"], payload["value"], work, parts, scale=scale, softcap=softcap
        )

    def select(self, payload: Payload, index: Tensor, owners: Tensor | None = None) -> Payload:
        return select_entries(payload, index)

    def join(self, payloads: Sequence[Payload], runs: int = 1) -> Payload:
        return join_entries(payloads, runs=runs)


def _own(tensor: Tensor) -> Tensor:
    """A contiguous tensor that fills its storage: a view would keep the whole prefill alive behind a small slice."""
    exact = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if exact else tensor.clone(memory_format=torch.contiguous_format)
