"""`TurboQuantCodec`: rotated keys and values in 2 to 8 bits a number, attended without being decoded in memory.

TurboQuant (arXiv 2504.19874) rotates every vector at random, so that its coordinates follow one known law, and
quantises them with the best codebook for it. This is the practical form; `PaperTurboQuantCodec` is the published one.
What is different, and why:

- The rotation is a randomised Hadamard matrix, and the query is rotated instead of the keys back.
- Of every (row, head) the mean of its keys is removed before the rotation. Most of the energy of keys is in it (58 % on
  SmolLM2-135M after RoPE, 78 % before), and softmax needs it only as one number a query: q . mean. Tokens nearer to the
  origin than to the mean, as attention sinks are, keep it, and have a scale that is not positive: without that the
  sinks lose more than all others gain. Removing the mean before RoPE is no better there, and needs the positions.
- The levels are t (a + b t²), fitted to the best codebook: as good, and computable where a table is slow.
- The scale is searched (see `kernels/encode_entries.py`) instead of the norm.
- No QJL residual: it makes inner products unbiased at the cost of a variance that softmax amplifies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_kvcache.codecs.checks import check_bits, check_finite, check_head_dim, check_width
from hf_kvcache.codecs.codebooks import cubic
from hf_kvcache.codecs.codec import Payload, join_entries, one_reader, select_entries
from hf_kvcache.codecs.rotation import rotation
from hf_kvcache.codecs.scalar import all_stored
from hf_kvcache.kernels.code_attention import code_attention, levels_of
from hf_kvcache.kernels.encode_entries import chosen, encode_entries, of_owners
from hf_kvcache.kernels.library import has_kernel, uses_triton
from hf_kvcache.kernels.prepare_query import prepare_query
from hf_kvcache.kernels.ragged_attention import ragged_code_attention

BITS = (2, 3, 4, 8)
# scales tried, in units of the norm: keys pay for a finer search, since their errors matter several times as much
KEY_FACTORS = (0.9, 1.0, 1.1)
VALUE_FACTORS = (0.92, 1.04)


@dataclass(frozen=True)
class TurboQuantCodec:
    """Keys and values as codes of a rotated vector and a float16 scale.

    Payload: `key_codes` and `value_codes` `[N, D * bits / 8]`, `key_scale` and `value_scale` `[N]`; and, counting
    owners instead of entries, `mean` `[owners, D]` in the dtype of the keys.

    Args:
        key_bits, value_bits: 2, 3, 4 or 8 bits a number.
        center: remove the mean of the keys of every owner.
        residual_length, block: see `Codec`.
        seed: of the rotation.
    """

    name: ClassVar[str] = "turboquant"
    lossy: ClassVar[bool] = True

    key_bits: int = 4
    value_bits: int = 4
    center: bool = True
    residual_length: int = 0
    block: int = 0
    seed: int = 0

    def __post_init__(self):
        check_bits("keys", self.key_bits, BITS)
        check_bits("values", self.value_bits, BITS)

    def check_fit(self, dim: int) -> None:
        check_width(dim)

    def encode(self, key: Tensor, value: Tensor, owners: Tensor | None = None, like: Payload | None = None) -> Payload:
        check_head_dim(key, value)
        if not uses_triton(key):
            # PyTorch looks codes up by the numbers
            check_finite(key=key, value=value)
        mean = _means(key, owners, self.center) if like is None else like["mean"]
        return self._encode(key[None, None], value[None, None], None, owners, mean)

    def encode_chosen(
        self, key: Tensor, value: Tensor, index: Tensor, owners: Tensor, like: Payload | None = None
    ) -> Payload:
        check_head_dim(key, value)
        mean = _means(chosen(key, index), owners, self.center) if like is None else like["mean"]
        return self._encode(key, value, index, owners, mean)

    def decode(self, payload: Payload, owners: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean = payload["mean"]
        key_levels, value_levels = self._levels(mean)
        back = self._rotation(mean).T
        scale = payload["key_scale"].to(torch.float32)
        key = levels_of(payload["key_codes"], key_levels) @ back * scale.abs()[:, None]
        if self.center:
            key += of_owners(mean.to(torch.float32), owners, len(key)) * (scale > 0)[:, None]
        value = levels_of(payload["value_codes"], value_levels) @ back
        value *= payload["value_scale"].to(torch.float32)[:, None]
        return key.to(mean.dtype), value.to(mean.dtype)

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
        rows, heads, tokens = shape
        entries = slice(start, start + rows * heads * tokens)
        rotation = self._rotation(query)
        key_levels, value_levels = self._levels(query)
        turned, shift = self._prepared(query, payload, owners)
        folded, mask = one_reader(turned, heads, tokens, mask)
        out, lse = code_attention(
            folded,
            (payload["key_codes"][entries], payload["key_scale"][entries], key_levels),
            (payload["value_codes"][entries], payload["value_scale"][entries], value_levels),
            None if shift is None else shift.view(folded.shape[:3]),
            mask,
            scale=scale,
            softcap=softcap,
        )
        return out.view(query.shape) @ rotation.T, lse.view(query.shape[:3])

    def attends_runs(self, payload: Payload, query: Tensor) -> bool:
        key, value = (
            (payload[f"{name}_codes"], payload[f"{name}_scale"], levels)
            for name, levels in zip(("key", "value"), self._levels(query), strict=True)
        )
        return has_kernel("code_attention", query, key, value)

    def attend_runs(
        self, payload: Payload, work: Tensor, parts: Tensor, query: Tensor, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        key_levels, value_levels = self._levels(query)
        turned, shift = self._prepared(query, payload)
        out, lse = ragged_code_attention(
            turned,
            (payload["key_codes"], payload["key_scale"], key_levels),
            (payload["value_codes"], payload["value_scale"], value_levels),
            work,
            parts,
            shift,
            scale=scale,
            softcap=softcap,
        )
        return out @ self._rotation(query).T, lse

    def select(self, payload: Payload, index: Tensor, owners: Tensor | None = None) -> Payload:
        return select_entries(payload, index, owners, of_owners=("mean",))

    def join(self, payloads: Sequence[Payload], runs: int = 1) -> Payload:
        return join_entries(payloads, shared=("mean",), runs=runs)

    def _encode(self, key: Tensor, value: Tensor, index: Tensor | None, owners: Tensor | None, mean: Tensor) -> Payload:
        """The payload of entries of `[B, H, T, D]`, all of them or those of an index."""
        key_codes, key_scale, value_codes, value_scale = encode_entries(
            key,
            value,
            index,
            None if owners is None else owners.flatten(),
            mean if self.center else None,
            self._rotation(key),
            self._levels(key),
            (KEY_FACTORS, VALUE_FACTORS),
        )
        scales, finite = all_stored(key_scale, value_scale)
        if not finite:
            # an entry that is not finite has a scale that is not; what was not chosen may be anything
            check_finite(key=key_scale[:, None], value=value_scale[:, None])
        return {
            "key_codes": key_codes,
            "key_scale": scales[0],
            "value_codes": value_codes,
            "value_scale": scales[1],
            "mean": mean,
        }

    def _prepared(self, query: Tensor, payload: Payload, owners: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The query as the codes are rotated, and q . mean `[R, H, M]`."""
        return prepare_query(query, self._rotation(query), payload["mean"] if self.center else None, owners)

    def _rotation(self, like: Tensor) -> Tensor:
        return rotation("hadamard", like.shape[-1], self.seed, like.device)

    def _levels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return cubic(like.shape[-1], self.key_bits), cubic(like.shape[-1], self.value_bits)


def _means(key: Tensor, owners: Tensor | None, center: bool) -> Tensor:
    """The mean key `[owners, D]` of every owner."""
    if not center:
        return key.new_zeros(1, key.shape[1])
    if owners is None:
        return key.to(torch.float32).mean(0, keepdim=True).to(key.dtype)
    if owners.dim() == 2 and owners.numel() and key.device.type != "cpu":
        # the sums below are taken entry by entry: on a CPU a row's are then the same in any batch, to the last bit, but
        # a GPU would spend more time on them than on the codes
        return _means_of_runs(key, owners)
    owners = owners.flatten().to(key.device)
    count = int(owners.max()) + 1 if len(owners) else 1
    total = torch.zeros(count, key.shape[1], device=key.device).index_add_(0, owners, key.to(torch.float32))
    # not `bincount`, which waits for the GPU to find the largest owner again
    members = torch.zeros(count, device=key.device).index_add_(0, owners, torch.ones_like(owners, dtype=torch.float32))
    return (total / members.clamp_min(1)[:, None]).to(key.dtype)


def _means_of_runs(key: Tensor, owners: Tensor) -> Tensor:
    """The same for owners `[O, N / O]`, whose entries lie one owner after the other."""
    return key.view(*owners.shape, -1).mean(1, dtype=torch.float32).to(key.dtype)
