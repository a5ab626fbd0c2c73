"""`Residual`: predictive coding of a page without the model's help. What the mean and the other layers and heads say of
a number is taken off it, and the rest is rounded to a step and packed.

1. the first tokens of a sequence stay in 16 bit: their keys are like no others
2. RoPE is undone (keys), the mean of every channel subtracted
3. an orthonormal transform across layers and heads, calibrated once a model (`basis`)
4. one uniform step for all components, from one knob; most become zero
5. codes packed into bytes and compressed (`codes`, `packing`)

The recipe is that of KVTC (arXiv 2511.01815) with a uniform step in place of allocated bits. Without a basis the
channels themselves are the components, with mean and deviation of the page. The last, partial page of a prompt stays in
16 bit: it is the recent window, and will be written again when it is full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_kvcache.sequential.basis import Basis, Part, gather, scatter
from hf_kvcache.sequential.codes import pack_codes, unpack_codes
from hf_kvcache.sequential.lossless import INTEGERS
from hf_kvcache.sequential.packing import PageError, join_planes, split_planes
from hf_kvcache.sequential.page import Coded, Context, Geometry, Page

SINKS = 4
# the finest quality, and one over the coarsest
MOST = 1e6


@dataclass(frozen=True)
class Residual:
    """Codes keys and values with a loss that one knob sets.

    Args:
        quality: components are rounded to 1/quality of the deviation of a layer's channels; without a basis, of the
            channel's own.
        basis: from calibration; None to take channels as they are.
        full: tokens of a full page; shorter pages stay in 16 bit. 0 to code every page.
        sinks: how many of the first tokens of a sequence stay in 16 bit.
    """

    name: ClassVar[str] = "residual"
    restores: ClassVar[bool] = True

    quality: float = 3.0
    basis: Basis | None = None
    full: int = 256
    sinks: int = SINKS

    def __post_init__(self):
        if not 1 / MOST <= self.quality <= MOST:
            raise ValueError(f"quality must be a positive number from {1 / MOST:g} to {MOST:g}, got {self.quality!r}")

    @property
    def identity(self) -> str:
        digest = "none" if self.basis is None else self.basis.digest
        return f"{self.name} {self.quality} {digest} {self.full} {self.sinks}"

    def encode(self, page: Page, context: Context) -> Coded:
        plain = len(page) if len(page) < self.full else min(max(self.sinks - page.start, 0), len(page))
        sections: dict[str, Any] = _to_half(page, plain)
        facts: dict[str, Any] = {"plain": plain}
        if plain < len(page):
            keys, values = self._unrotated(page, plain, context)
            parts, stored = self._parts(context.geometry, keys, values)
            components = [part.forward(gather((keys, values)[part.kind], part.members)) for part in parts]
            codes = torch.round(torch.cat(components, dim=1) * self.quality).to(torch.int32).numpy()
            packed, coded = pack_codes(np.ascontiguousarray(codes.T[_order(parts)]))
            facts |= {**packed, "quality": self.quality, "basis": "" if self.basis is None else self.basis.digest}
            sections |= {**coded, **stored}
        return Coded(facts, sections)

    def decode(self, coded: Coded, ids: np.ndarray, start: int, context: Context) -> Page:
        geometry, facts = context.geometry, coded.facts
        plain = facts.get("plain")
        if type(plain) is not int or not 0 <= plain <= len(ids):
            raise PageError(f"a page of {len(ids)} tokens cannot have {str(plain)[:20]} plain ones")
        keys, values = _from_half(coded.sections, geometry, plain)
        if plain < len(ids):
            quality = facts.get("quality")
            if not isinstance(quality, (float, int)) or not 1 / MOST <= quality <= MOST:
                raise PageError("a page must say the quality it was coded with")
            if facts.get("basis") != ("" if self.basis is None else self.basis.digest):
                raise PageError(f"the page was coded with the basis {str(facts.get('basis'))[:20]!r}, not with ours")
            self._check(geometry)
            rest = len(ids) - plain
            parts = _restored_parts(coded.sections, geometry) if self.basis is None else self.basis.parts
            order = _order(parts)
            sorted_codes = unpack_codes(facts, coded.sections, (len(order), rest))
            codes = np.empty_like(sorted_codes)
            codes[order] = sorted_codes
            decoded = self._decoded(torch.from_numpy(codes), quality, parts, geometry)
            positions = torch.arange(start + plain, start + len(ids))
            for place in range(len(geometry.producers)):
                key = decoded[0][place]
                key = key if context.rotate is None else context.rotate(place, key, positions, False)
                keys[place] = torch.cat([keys[place], key.to(geometry.dtype)], dim=1)
                values[place] = torch.cat([values[place], decoded[1][place].to(geometry.dtype)], dim=1)
        return Page(ids, start, keys, values)

    def _unrotated(self, page: Page, plain: int, context: Context) -> tuple[list[Tensor], list[Tensor]]:
        """Keys before RoPE and values of the tokens to code, in float32."""
        positions = torch.arange(page.start + plain, page.start + len(page))
        keys = [key[:, plain:].float() for key in page.keys]
        if context.rotate is not None:
            keys = [context.rotate(place, key, positions, True) for place, key in enumerate(keys)]
        return keys, [value[:, plain:].float() for value in page.values]

    def _parts(
        self, geometry: Geometry, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[tuple[Part, ...], dict[str, bytes]]:
        """The transform, and what of it the page must carry."""
        if self.basis is not None:
            self._check(geometry)
            return self.basis.parts, {}
        stored = {}
        for kind, tensors in enumerate((keys, values)):
            channels = gather(tensors, range(len(tensors)))
            scale = channels.std(0, correction=0).clamp_min(1e-6)
            stored[f"statistics{kind}"] = torch.cat([channels.mean(0), scale]).half().numpy().tobytes()
        return _restored_parts(stored, geometry), stored

    def _check(self, geometry: Geometry) -> None:
        if self.basis is None:
            return
        own, given = ((g.producers, g.heads, g.dims) for g in (self.basis.geometry, geometry))
        if own != given:
            raise PageError(
                f"the basis is for layers {own[0]} with {own[1]} heads of {own[2]}, the cache has {given[0]}, "
                f"{given[1]}, {given[2]}; calibrate one for this model and plan"
            )

    @staticmethod
    def _decoded(
        codes: Tensor, quality: float, parts: tuple[Part, ...], geometry: Geometry
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Keys and values by producer, `[H, n, D]`, from codes `[J, n]`."""
        result: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        first = 0
        for part in parts:
            own = codes[first : first + len(part.mean)]
            first += len(part.mean)
            if part.transform is None:
                channels = part.backward(own.T / quality)
            else:
                # components that are zero throughout cost nothing
                used = own.any(1).nonzero()[:, 0]
                scaled = (own[used].T / quality) @ part.transform.T[used]
                channels = scaled * part.scale + part.mean
            result[part.kind].update(scatter(channels, part.members, geometry))
        return result


def _order(parts: tuple[Part, ...]) -> np.ndarray:
    """Components by their deviation, largest first: neighbours are then packed alike."""
    return torch.cat([part.deviation for part in parts]).argsort(descending=True, stable=True).numpy()


def _restored_parts(sections: Any, geometry: Geometry) -> tuple[Part, ...]:
    """Parts without a transform, from the means and deviations that a page carries."""
    members = tuple(range(len(geometry.producers)))
    count = geometry.numbers // 2
    parts = []
    for kind in range(2):
        data = sections.get(f"statistics{kind}")
        if data is None or len(data) != 4 * count:
            raise PageError(f"a page without a basis must carry {2 * count} statistics")
        mean, scale = torch.from_numpy(np.frombuffer(data, dtype=np.float16).astype(np.float32)).split(count)
        parts.append(Part(kind, members, mean, scale.clamp_min(1e-6), None, torch.ones(count)))
    return tuple(parts)


def _to_half(page: Page, tokens: int) -> dict[str, bytes | memoryview]:
    """The first tokens in 16 bit, as byte planes."""
    if not tokens:
        return {}
    flat = page.first(tokens).flat()
    half = (flat if flat.dtype.itemsize == 2 else flat.to(torch.bfloat16)).view(torch.int16).numpy()
    return {f"half{index}": plane.data for index, plane in enumerate(split_planes(half))}


def _from_half(sections: Any, geometry: Geometry, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """The inverse of `_to_half`."""
    if not tokens:
        return geometry.split(torch.empty(0, dtype=geometry.dtype), 0)
    planes = [sections.get(f"half{index}") for index in range(2)]
    if any(plane is None or len(plane) != geometry.numbers * tokens for plane in planes):
        raise PageError(f"{tokens} plain tokens must have two planes of {geometry.numbers * tokens} bytes")
    flat = torch.from_numpy(join_planes(planes, INTEGERS[2][1]))
    held = geometry.dtype if geometry.dtype.itemsize == 2 else torch.bfloat16
    return geometry.split(flat.view(held).to(geometry.dtype), tokens)
