"""`Residual`: predictive coding of a page without the model's help. What the mean and the other layers and heads say of
a number is taken off it, and the rest is rounded and range coded.

1. the first token of a sequence stays in 16 bit: its keys and values are like no others
2. RoPE is undone (keys), the mean of every channel subtracted
3. channels weighed by what an error in them costs, and an orthonormal transform across keys and values of layers and
   heads; both calibrated once a model (`basis`)
4. one error for all components, from one knob; most become zero, and those that do not share a trellis (`rounding`)
5. codes range coded in classes of one size (`codes`)

The recipe is that of KVTC (arXiv 2511.01815) with a uniform step in place of allocated bits, and with keys and values
in one transform under the metric of the model's predictions. Without a basis the channels themselves are the
components, with means of the page and one deviation a head. The last, partial page of a prompt stays in 16 bit: it is
the recent window, and will be written again when it is full. So does a page with numbers that are not finite, and one
that codes do not make smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_kvcache.sequential import rounding
from hf_kvcache.sequential.basis import Basis, KeysValues, Part, gather, scatter
from hf_kvcache.sequential.lossless import INTEGERS
from hf_kvcache.sequential.packing import PageError, compress, join_planes, split_planes
from hf_kvcache.sequential.page import Coded, Context, Geometry, Page

SINKS = 1
# the default without a basis
PLAIN_QUALITY = 3.0
# the finest quality, and one over the coarsest
MOST = 1e6


@dataclass(frozen=True)
class Residual:
    """Codes keys and values with a loss that one knob sets.

    Args:
        quality: components err as if each were rounded to 1/quality. With a basis the unit is that of
            `calibration.sequential_basis`, and 8 costs SmolLM2 about what 4 bits of TurboQuant do
            (`sequential_rate.csv`); without one it is the deviation of a head, and 3 does.
        basis: from calibration; None to take channels as they are.
        full: tokens of a full page; shorter pages stay in 16 bit. 0 to code every page.
        sinks: how many of the first tokens of a sequence stay in 16 bit.
    """

    name: ClassVar[str] = "residual"
    restores: ClassVar[bool] = True

    quality: float = 8.0
    basis: Basis | None = None
    full: int = 256
    sinks: int = SINKS

    def __post_init__(self):
        if not 1 / MOST <= self.quality <= MOST:
            raise ValueError(f"quality must be a positive number from {1 / MOST:g} to {MOST:g}, got {self.quality!r}")

    @property
    def repeatable(self) -> int:
        return self.full - 1

    @property
    def identity(self) -> str:
        digest = "none" if self.basis is None else self.basis.digest
        return f"{self.name} trellis {self.quality} {digest} {self.full} {self.sinks}"

    def encode(self, page: Page, context: Context) -> Coded:
        plain = len(page) if len(page) < self.full else min(max(self.sinks - page.start, 0), len(page))
        coded = self._coded(page, plain, context) if plain < len(page) else None
        if coded is not None and not _outweighs_plain(coded, page):
            return coded
        return Coded({"plain": len(page)}, _to_half(page, len(page)))

    def _coded(self, page: Page, plain: int, context: Context) -> Coded | None:
        """All but the first `plain` tokens in codes; None for numbers that codes cannot hold."""
        tensors = self._unrotated(page, plain, context)
        if not all(bool(tensor.isfinite().all()) for kind in tensors for tensor in kind):
            return None
        parts, stored = self._parts(context.geometry, tensors)
        if not parts:
            return None
        components = torch.cat([part.forward(gather(tensors, part.members)) for part in parts], dim=1)
        if not bool(components.isfinite().all()):
            return None
        sections = rounding.encode((components * self.quality).T.contiguous().numpy())
        basis = "" if self.basis is None else self.basis.digest
        facts = {"plain": plain, "quality": self.quality, "basis": basis}
        return Coded(facts, {**_to_half(page, plain), **sections, **stored})

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
            parts = _restored_parts(coded.sections, geometry) if self.basis is None else self.basis.parts
            components = rounding.decode(coded.sections, (geometry.numbers, len(ids) - plain))
            components /= np.float32(quality)
            decoded = _decoded(components, parts, geometry)
            positions = torch.arange(start + plain, start + len(ids))
            for place in range(len(geometry.producers)):
                key = decoded[0][place]
                key = key if context.rotate is None else context.rotate(place, key, positions, False)
                keys[place] = torch.cat([keys[place], key.to(geometry.dtype)], dim=1)
                values[place] = torch.cat([values[place], decoded[1][place].to(geometry.dtype)], dim=1)
        return Page(ids, start, keys, values)

    def _unrotated(self, page: Page, plain: int, context: Context) -> KeysValues:
        """Keys before RoPE and values of the tokens to code, in float32."""
        positions = torch.arange(page.start + plain, page.start + len(page))
        keys = [key[:, plain:].float() for key in page.keys]
        if context.rotate is not None:
            keys = [context.rotate(place, key, positions, True) for place, key in enumerate(keys)]
        return keys, [value[:, plain:].float() for value in page.values]

    def _parts(self, geometry: Geometry, tensors: KeysValues) -> tuple[tuple[Part, ...], dict[str, bytes]]:
        """The transform, and what of it the page must carry; no parts where 16 bit cannot carry it."""
        if self.basis is not None:
            self._check(geometry)
            return self.basis.parts, {}
        means = gather(tensors, range(len(geometry.producers))).mean(0).half()
        scales = torch.cat([tensor.std(1, correction=0).square().mean(1).sqrt() for kind in tensors for tensor in kind])
        scales = scales.clamp_min(1e-6).half()
        if not bool(means.isfinite().all() and scales.isfinite().all()):
            return (), {}
        stored = {"means": means.numpy().tobytes(), "scales": scales.numpy().tobytes()}
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


def _decoded(components: np.ndarray, parts: tuple[Part, ...], geometry: Geometry) -> tuple[dict[int, Tensor], ...]:
    """Keys and values by producer, `[H, n, D]`, from components `[J, n]`."""
    result: tuple[dict[int, Tensor], ...] = ({}, {})
    first = 0
    for part in parts:
        own = components[first : first + len(part.mean)]
        first += len(part.mean)
        # the last components, which are the smallest, are often zero throughout
        used = np.flatnonzero(own.any(1)).max(initial=-1) + 1
        channels = part.backward(torch.from_numpy(own[:used].T))
        for kind, found in zip(result, scatter(channels, part.members, geometry), strict=True):
            kind.update(found)
    return result


def _restored_parts(sections: Any, geometry: Geometry) -> tuple[Part, ...]:
    """A part without a transform, from the means of channels and the deviations of heads that a page carries."""
    heads = 2 * sum(geometry.heads)
    means, scales = (sections.get(name) for name in ("means", "scales"))
    if means is None or scales is None or len(means) != 2 * geometry.numbers or len(scales) != 2 * heads:
        raise PageError(f"a page without a basis must carry {geometry.numbers} means and {heads} deviations")
    mean, scale = (torch.from_numpy(np.frombuffer(data, np.float16).astype(np.float32)) for data in (means, scales))
    if not bool(mean.isfinite().all() and scale.isfinite().all()):
        raise PageError("the means and deviations of a page must be finite numbers")
    by_member = scale.clamp_min(1e-6).reciprocal().split(2 * geometry.heads)
    weights = tuple(own[:, None, None] * torch.eye(dim) for own, dim in zip(by_member, 2 * geometry.dims, strict=True))
    return (Part(tuple(range(len(geometry.producers))), mean, weights, None),)


def _outweighs_plain(coded: Coded, page: Page) -> bool:
    """Whether a page takes no fewer bytes in codes than in 16 bit, where that loses nothing."""
    dtype = page.keys[0].dtype
    size = sum(len(section) for section in coded.sections.values())
    # numbers hardly compress to half; packing both to compare them is spared where it is clear
    if dtype.itemsize != 2 or 4 * size < sum(tensor.nbytes for tensor in (*page.keys, *page.values)):
        return False
    mine, plain = (
        sum(len(compress(section)[1]) for section in sections.values())
        for sections in (coded.sections, _to_half(page, len(page)))
    )
    return mine >= plain


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
