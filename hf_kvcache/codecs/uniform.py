"""`UniformCodec`: a grid of equal steps between the least and the largest number of a group; no rotation.

    code = round((x - zero) / step),   zero = min of the group,   step = (max - min) / (2^bits - 1)

What most libraries do, and what the others are to be compared with. Groups of values lie along the channels of one
token. Those of keys do so too, or, with `key_axis="channel"`, lie along the tokens of one channel, since outliers of
keys stay in their channel (KIVI, arXiv 2402.02750).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.codecs.checks import check_bits, check_finite, check_head_dim, check_width
from hf_kvcache.codecs.chunks import ChunkedCodec
from hf_kvcache.codecs.codec import Payload, select_entries
from hf_kvcache.codecs.scalar import as_stored, stored
from hf_kvcache.kernels.code_attention import pack, unpack

BITS = (2, 3, 4, 8)
AXES = ("channel", "token")


@dataclass(frozen=True)
class UniformCodec(ChunkedCodec):
    """Codes with a step and a zero for every group.

    Payload: `key_codes`, `value_codes` `[N, D * bits / 8]`; `value_step`, `value_zero` `[N, groups]`; of keys the same,
    or, counting groups of consecutive entries of one owner instead of entries, `[groups, D]`; `key_group` `[N]` says
    which is whose, unless all groups are full and lie one behind the other.

    Args:
        key_bits, value_bits: 2, 3, 4 or 8 bits a number.
        key_axis: `"channel"`: a group of keys is one channel of `group_size` tokens; `"token"`: channels of one token.
        group_size: numbers in a group; in groups of channels the head_dim when that is less.
        residual_length, block: see `Codec`.
    """

    name: ClassVar[str] = "uniform"
    lossy: ClassVar[bool] = True

    key_bits: int = 4
    value_bits: int = 4
    key_axis: str = "channel"
    group_size: int = 64
    residual_length: int = 0
    block: int = 0

    def __post_init__(self):
        check_bits("keys", self.key_bits, BITS)
        check_bits("values", self.value_bits, BITS)
        if self.key_axis not in AXES:
            raise ValueError(f"key_axis must be one of {', '.join(AXES)}, got {self.key_axis!r}")
        if not isinstance(self.group_size, int) or self.group_size < 8:
            raise ValueError(f"group_size must be a whole number of at least 8, got {self.group_size!r}")

    def check_fit(self, dim: int) -> None:
        check_width(dim)
        self._size(dim)

    def encode(self, key: Tensor, value: Tensor, owners: Tensor | None = None, like: Payload | None = None) -> Payload:
        check_head_dim(key, value)
        check_finite(key=key, value=value)
        by_channel = self.key_axis == "channel"
        group = None
        if by_channel:
            group = self._groups(owners, key)
            key_codes, key_step, key_zero = _by_channel(key, self.key_bits, group)
        else:
            key_codes, key_step, key_zero = self._by_token(key, self.key_bits)
        value_codes, value_step, value_zero = self._by_token(value, self.value_bits)
        payload = {
            "key_codes": pack(key_codes, self.key_bits),
            "key_step": stored(key_step),
            "key_zero": stored(key_zero),
            "value_codes": pack(value_codes, self.value_bits),
            "value_step": stored(value_step),
            "value_zero": stored(value_zero),
            "like": key.new_zeros(1),
        }
        if group is not None and not torch.equal(group, torch.arange(len(group)).to(group) // self.group_size):
            payload["key_group"] = group.to(torch.int32)
        return payload

    def select(self, payload: Payload, index: Tensor, owners: Tensor | None = None) -> Payload:
        if self.key_axis == "token":
            return super().select(payload, index)
        # groups that have lost all their entries go: eviction while decoding would pile up their steps without end
        used, group = self._group_of(payload, index).unique(return_inverse=True)
        by_group = {name: payload[name][used] for name in ("key_step", "key_zero")}
        by_entry = {name: tensor for name, tensor in payload.items() if name not in (*by_group, "key_group")}
        return select_entries(by_entry, index, shared=self.shared) | by_group | {"key_group": group.to(torch.int32)}

    def join(self, payloads: Sequence[Payload], runs: int = 1) -> Payload:
        if self.key_axis == "token":
            return super().join(payloads, runs)
        parts, groups = [], 0
        for payload in payloads:
            entries = torch.arange(len(payload["key_codes"]), device=payload["key_codes"].device)
            parts.append(payload | {"key_group": (self._group_of(payload, entries) + groups).to(torch.int32)})
            groups += len(payload["key_step"])
        # steps and zeros count groups, which lie payload after payload
        by_group = {name: torch.cat([part.pop(name) for part in parts]) for name in ("key_step", "key_zero")}
        return super().join(parts, runs) | by_group

    def _by_token(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[N, D]`, steps and zeros `[N, groups]`."""
        size = self._size(x.shape[1])
        codes, step, zero = _grid(x.to(torch.float32).view(len(x), x.shape[1] // size, size), bits, dim=2)
        return codes.view(x.shape), step.squeeze(2), zero.squeeze(2)

    def _size(self, dim: int) -> int:
        """Channels in a group of `dim`."""
        size = min(self.group_size, dim)
        if dim % size:
            raise ValueError(f"group_size must divide the head_dim {dim} or exceed it, got {self.group_size}")
        return size

    def _groups(self, owners: Tensor | None, key: Tensor) -> Tensor:
        """The group of every entry `[N]`: `group_size` consecutive entries of one owner; its last group may be short.

        Groups over several owners would make what is stored of a row depend on the other rows of its batch.
        """
        owner = key.new_zeros(len(key), dtype=torch.long) if owners is None else owners.flatten().to(key.device)
        order = owner.argsort(stable=True)
        count = owner.bincount()
        rank = torch.empty_like(owner)
        rank[order] = torch.arange(len(owner), device=key.device) - (count.cumsum(0) - count)[owner[order]]
        groups = (count + self.group_size - 1) // self.group_size
        return (groups.cumsum(0) - groups)[owner] + rank // self.group_size

    def _group_of(self, payload: Payload, entries: Tensor) -> Tensor:
        """The group of the keys of some entries."""
        groups = payload.get("key_group")
        return entries.to(payload["key_codes"].device) // self.group_size if groups is None else groups[entries]

    def decode_range(self, payload: Payload, first: int, last: int) -> tuple[Tensor, Tensor]:
        key, value = (
            unpack(payload[f"{name}_codes"][first:last], bits).to(torch.float32)
            for name, bits in (("key", self.key_bits), ("value", self.value_bits))
        )
        if self.key_axis == "channel":
            group = self._group_of(payload, torch.arange(first, last, device=key.device))
            key = key * payload["key_step"][group].float() + payload["key_zero"][group].float()
        else:
            key = _of_grid(key, payload["key_step"][first:last], payload["key_zero"][first:last])
        value = _of_grid(value, payload["value_step"][first:last], payload["value_zero"][first:last])
        return key.to(payload["like"].dtype), value.to(payload["like"].dtype)


def _grid(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, steps and zeros of the groups along `dim`."""
    zero = as_stored(x.amin(dim, keepdim=True))
    step = as_stored((x.amax(dim, keepdim=True) - zero) / (2**bits - 1))
    codes = ((x - zero) / step.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), step, zero


def _by_channel(x: Tensor, bits: int, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[N, D]` of entries in groups `[N]`, steps and zeros `[groups, D]`."""
    x = x.to(torch.float32)
    count = int(group.max()) + 1 if len(group) else 0
    index, empty = group[:, None].expand_as(x), x.new_empty(count, x.shape[1])
    lowest = empty.scatter_reduce(0, index, x, "amin", include_self=False)
    highest = empty.scatter_reduce(0, index, x, "amax", include_self=False)
    zero = as_stored(lowest)
    step = as_stored((highest - zero) / (2**bits - 1))
    codes = ((x - zero[group]) / step[group].clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), step, zero


def _of_grid(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """The numbers of codes `[N, D]` in groups along the channels."""
    grouped = codes.unflatten(1, (step.shape[1], codes.shape[1] // step.shape[1]))
    return (grouped * step.float()[..., None] + zero.float()[..., None]).view(codes.shape)
