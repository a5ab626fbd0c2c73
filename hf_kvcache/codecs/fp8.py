"""`Fp8Codec`: eight-bit floating point (e4m3) with a scale for every key and every value.

    x = scale * float8(x / scale),   scale = max |x| / 448, the largest number of e4m3

The usual choice on new GPUs: half the bytes of bfloat16 at almost no loss, and little to decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.codecs.checks import check_finite
from hf_kvcache.codecs.chunks import ChunkedCodec
from hf_kvcache.codecs.codec import Payload
from hf_kvcache.codecs.scalar import as_stored, stored

LARGEST = 448.0


@dataclass(frozen=True)
class Fp8Codec(ChunkedCodec):
    """Keys and values in eight bits and a float16 scale an entry.

    Payload: `key_codes`, `value_codes` `[N, D]`, uint8, which every file format and device can hold; `key_scale`,
    `value_scale` `[N]`.

    Args:
        residual_length, block: see `Codec`.
    """

    name: ClassVar[str] = "fp8"
    lossy: ClassVar[bool] = True

    residual_length: int = 0
    block: int = 0

    def __post_init__(self):
        if not hasattr(torch, "float8_e4m3fn"):
            raise RuntimeError("this torch has no float8_e4m3fn; update it, or use turboquant with bits=8")

    def encode(self, key: Tensor, value: Tensor, owners: Tensor | None = None, like: Payload | None = None) -> Payload:
        check_finite(key=key, value=value)
        payload = {"like": key.new_zeros(1)}
        for name, tensor in (("key", key), ("value", value)):
            x = tensor.to(torch.float32)
            # rounded up, or the largest number would become infinite
            scale = as_stored(x.abs().amax(1) / LARGEST * (1 + 2**-10)).clamp_min(2**-24)
            payload[f"{name}_codes"] = (x / scale[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
            payload[f"{name}_scale"] = stored(scale)
        return payload

    def decode_range(self, payload: Payload, first: int, last: int) -> tuple[Tensor, Tensor]:
        key, value = (
            payload[f"{name}_codes"][first:last].view(torch.float8_e4m3fn).to(torch.float32)
            * payload[f"{name}_scale"][first:last].to(torch.float32)[:, None]
            for name in ("key", "value")
        )
        return key.to(payload["like"].dtype), value.to(payload["like"].dtype)
