"""`PaperTurboQuantCodec`: TurboQuant as published (arXiv 2504.19874), for comparison and for study.

Setup: Π, the orthogonal factor of a Gaussian matrix; for every bit width the Lloyd-Max codebook c of a coordinate of a
random unit vector in D dimensions. Algorithm 1, TurboQuant_mse, for x of norm |x|:

    y = Π x / |x|,   idx_j = argmin_k |y_j - c_k|,   x~ = |x| Πᵀ c[idx]            b D bits and |x|

Algorithm 2, TurboQuant_prod, whose inner products are unbiased:

    x~_mse from b - 1 bits,   r = x - x~_mse,   qjl = sign(S r) with S Gaussian,   γ = |r|
    x~ = x~_mse + √(π/2) / D γ Sᵀ qjl                                              b D bits, |x| and γ

Fractional widths split the channels in two sets, each with its own instance: those with most energy, the outliers, get
one bit more. The paper calls 32 of 128 channels with 3 bits and 96 with 2 "2.5 bits"; it is 2.25. Here half of the
channels are outliers unless `outlier_channels` says otherwise, which is 2.5. Norms are float16: `bits_per_element`
counts them.

Attention decodes a few thousand entries at a time; keys and values are rotated back, so it is slow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.codecs.checks import check_bits, check_finite, check_head_dim, check_width
from hf_kvcache.codecs.chunks import ChunkedCodec
from hf_kvcache.codecs.codebooks import lloyd_max
from hf_kvcache.codecs.codec import Payload
from hf_kvcache.codecs.rotation import rotation
from hf_kvcache.codecs.scalar import stored
from hf_kvcache.kernels.code_attention import levels_of, pack

BITS = (2, 2.5, 3, 3.5, 4, 8)
# prod keeps one of its bits for the signs
PROD_BITS = (2, 3, 4)
VARIANTS = ("mse", "prod")


@dataclass(frozen=True)
class PaperTurboQuantCodec(ChunkedCodec):
    """Keys by the chosen variant, values by TurboQuant_mse.

    Payload, with x one of key and value and i the number of the instance (0 the outliers, 1 the others): `x_i_codes`,
    `x_i_norm`; and of the keys of prod `key_i_signs`, `key_i_residual`. Where a width is fractional, every owner has
    its own outliers, so that a row of a batch is encoded as it is alone: `x_order` `[n, D]`, the channels, outliers
    first; `orders` `[owners]`, which of the n is an owner's; and `order` `[N]`, which an entry was encoded by, unless
    the entries lie owner by owner, as many of each.

    Args:
        key_bits, value_bits: 2, 2.5, 3, 3.5, 4 or 8; prod takes 2, 3 and 4.
        variant: `"mse"` or `"prod"`.
        outlier_channels: of a fractional width; None for half of the channels.
        residual_length, block: see `Codec`.
        seed: of Π and S.
    """

    name: ClassVar[str] = "turboquant-paper"
    lossy: ClassVar[bool] = True
    shared: ClassVar[tuple[str, ...]] = ("like", "key_order", "value_order")
    of_owners: ClassVar[tuple[str, ...]] = ("orders",)

    key_bits: float = 4
    value_bits: float = 4
    variant: str = "mse"
    outlier_channels: int | None = None
    residual_length: int = 0
    block: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        check_bits("keys", self.key_bits, PROD_BITS if self.variant == "prod" else BITS)
        check_bits("values", self.value_bits, BITS)

    def check_fit(self, dim: int) -> None:
        check_width(dim)
        for bits in (self.key_bits, self.value_bits):
            self._parts(bits, dim)

    def encode(self, key: Tensor, value: Tensor, owners: Tensor | None = None, like: Payload | None = None) -> Payload:
        check_head_dim(key, value)
        check_finite(key=key, value=value)
        payload = {"like": key.new_zeros(1)}
        widths = {"key": self.key_bits, "value": self.value_bits}
        if any(bits != int(bits) for bits in widths.values()):
            owner = key.new_zeros(len(key), dtype=torch.long) if owners is None else owners.flatten().to(key.device)
            count = int(owner.max()) + 1 if len(owner) else 1
            orders = torch.arange(count, device=key.device) if like is None else like["orders"].long()
            # owners behind the last one that had an entry take its order, as good as any
            order = orders[owner.clamp(max=len(orders) - 1)]
            payload["orders"] = orders.to(torch.int16)
            if not torch.equal(order, _in_turn(torch.arange(len(order), device=key.device), len(order), len(orders))):
                payload["order"] = order.to(torch.int16)
        for name, tensor in (("key", key), ("value", value)):
            x, bits = tensor.to(torch.float32), widths[name]
            if bits != int(bits):
                by_owner = _orders(x, owner, count) if like is None else like[f"{name}_order"]
                payload[f"{name}_order"] = by_owner.to(torch.int16)
                x = x.gather(1, by_owner[order].long())
            parts = self._parts(bits, x.shape[1])
            for number, (part, (width, _)) in enumerate(
                zip(x.split([count for _, count in parts], dim=1), parts, strict=True)
            ):
                payload |= {f"{name}_{number}_{what}": t for what, t in self._encode(part, width, name).items()}
        return payload

    def bits_per_element(self, dim: int) -> float:
        """The true bits a number of keys and values, norms included; the channels' order is counted apart."""
        total = 0.0
        for name, bits in (("key", self.key_bits), ("value", self.value_bits)):
            for width, count in self._parts(bits, dim):
                norms = 2 if name == "key" and self.variant == "prod" else 1
                total += width * count + 16 * norms
        return total / 2 / dim

    def _parts(self, bits: float, dim: int) -> list[tuple[int, int]]:
        """(bits, channels) of every instance."""
        if bits == int(bits):
            return [(int(bits), dim)]
        outliers = dim // 2 if self.outlier_channels is None else self.outlier_channels
        if not 8 <= outliers <= dim - 8 or outliers % 8:
            raise ValueError(
                f"outlier_channels must be a multiple of 8 between 8 and {dim - 8} at head_dim {dim}, got {outliers}"
            )
        return [(math.ceil(bits), outliers), (math.floor(bits), dim - outliers)]

    def _encode(self, x: Tensor, bits: int, name: str) -> Payload:
        residual = self.variant == "prod" and name == "key"
        width = bits - 1 if residual else bits
        dim = x.shape[1]
        turned = rotation("dense", dim, self.seed, x.device)
        norm = torch.linalg.vector_norm(x, dim=1)
        unit = x / norm.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        levels = lloyd_max(dim, width).to(x.device, torch.float32)
        codes = torch.bucketize(unit @ turned * dim**0.5, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        payload = {"norm": stored(norm)}
        if residual:
            left = unit - levels[codes.int()] / dim**0.5 @ turned.T
            signs = (left @ _projection(dim, self.seed, x.device).T >= 0).to(torch.uint8)
            payload |= {"signs": _pack_signs(signs), "residual": stored(torch.linalg.vector_norm(left, dim=1) * norm)}
        payload["codes"] = _pack_signs(codes) if width == 1 else pack(codes, width)
        return payload

    def decode_range(self, payload: Payload, first: int, last: int) -> tuple[Tensor, Tensor]:
        decoded = []
        for name, bits in (("key", self.key_bits), ("value", self.value_bits)):
            parts = [
                self._decode_part(payload, f"{name}_{number}", slice(first, last), width, count)
                for number, (width, count) in enumerate(self._parts(bits, self._dim(payload, name, bits)))
            ]
            x = torch.cat(parts, dim=1)
            if bits != int(bits):
                order = self._order_of(payload, torch.arange(first, last, device=x.device))
                x = torch.empty_like(x).scatter_(1, payload[f"{name}_order"][order].long(), x)
            decoded.append(x.to(payload["like"].dtype))
        return decoded[0], decoded[1]

    def select(self, payload: Payload, index: Tensor, owners: Tensor | None = None) -> Payload:
        return super().select(self._with_order(payload), index, owners)

    def join(self, payloads: Sequence[Payload], runs: int = 1) -> Payload:
        return super().join([self._with_order(payload) for payload in payloads], runs)

    def _with_order(self, payload: Payload) -> Payload:
        """The payload with an order for every entry, where channels have orders."""
        if "orders" not in payload or "order" in payload:
            return payload
        entries = torch.arange(len(payload["key_0_codes"]), device=payload["like"].device)
        return payload | {"order": self._order_of(payload, entries).to(torch.int16)}

    def _order_of(self, payload: Payload, entries: Tensor) -> Tensor:
        """Which order of channels some entries were encoded by."""
        if "order" in payload:
            return payload["order"][entries].long()
        return _in_turn(entries, len(payload["key_0_codes"]), len(payload["orders"]))

    def _dim(self, payload: Payload, name: str, bits: float) -> int:
        """D."""
        if bits != int(bits):
            return payload[f"{name}_order"].shape[1]
        width = int(bits) - (f"{name}_0_signs" in payload)
        return payload[f"{name}_0_codes"].shape[1] * 8 // width

    def _decode_part(self, payload: Payload, prefix: str, entries: slice, bits: int, dim: int) -> Tensor:
        codes, norm = (payload[f"{prefix}_{what}"][entries] for what in ("codes", "norm"))
        residual = f"{prefix}_signs" in payload
        width = bits - 1 if residual else bits
        levels = lloyd_max(dim, width)
        rotated = (_unpack_signs(codes) * levels[1].item()) if width == 1 else levels_of(codes, levels)
        x = rotated / dim**0.5 @ rotation("dense", dim, self.seed, codes.device).T * norm.to(torch.float32)[:, None]
        if residual:
            length = payload[f"{prefix}_residual"][entries].to(torch.float32)
            signs = _unpack_signs(payload[f"{prefix}_signs"][entries])
            x += math.sqrt(math.pi / 2) / dim * length[:, None] * (signs @ _projection(dim, self.seed, x.device))
        return x


def _in_turn(entries: Tensor, total: int, owners: int) -> Tensor:
    """The owners of some of `total` entries that lie owner by owner, as many of each."""
    return entries // max(total // owners, 1)


def _orders(x: Tensor, owner: Tensor, count: int) -> Tensor:
    """The channels of every owner of entries `[N, D]`, those of most energy first: `[count, D]`."""
    energy = x.new_zeros(count, x.shape[1]).index_add_(0, owner, x.square())
    return energy.argsort(dim=1, descending=True, stable=True)


def _projection(dim: int, seed: int, device: torch.device) -> Tensor:
    """S `[D, D]` with independent entries of N(0, 1)."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(dim, dim, generator=generator).to(device)


def _pack_signs(bits: Tensor) -> Tensor:
    """Eight of the bits `[N, D]`, uint8 of 0 and 1, to a byte."""
    packed = bits[:, ::8].clone()
    for place in range(1, 8):
        packed |= bits[:, place::8] << place
    return packed


def _unpack_signs(packed: Tensor) -> Tensor:
    """+1 and -1, float32 `[N, D]`."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> places & 1).to(torch.float32) * 2 - 1).flatten(1)
