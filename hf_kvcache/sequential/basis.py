"""`Basis`: how keys and values are turned into few large and many small numbers, by one calibration a model.

Keys without RoPE and values hang together across layers and heads, and with each other. Layers are taken in groups. In
each the mean is subtracted; the channels of every head are weighed by what an error in them does to the model's
predictions (a matrix a head, `calibration.sequential_basis`); and the vector of all keys and values of the group is
turned by an orthonormal matrix (principal components), largest first. One step for all components then spends bits
where they matter most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from hf_kvcache import safefile
from hf_kvcache.sequential.page import Geometry

FORMAT = "hf_kvcache.basis/2"
HOW = "make one with hf-kvcache calibrate sequential"
# keys and values of a group: what a matrix product and a file bear
CHANNELS = 4096

KeysValues = tuple[Sequence[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Part:
    """Keys and values of one group of layers, as channels: the keys by producer, head, dimension, then the values.

    Args:
        members: which producers, counted from 0, in order.
        mean: of every channel, `[C]`.
        weights: by member, keys first: what the channels of every head are multiplied by, `[H, D, D]`, symmetric.
        transform: `[C, C]`, a component in every column, the largest first; None to leave channels as they are.
    """

    members: tuple[int, ...]
    mean: Tensor
    weights: tuple[Tensor, ...]
    transform: Tensor | None

    def forward(self, channels: Tensor) -> Tensor:
        """Components `[n, C]` of channels `[n, C]`."""
        weighed = by_head(channels - self.mean, self.weights)
        return weighed if self.transform is None else weighed @ self.transform

    def backward(self, components: Tensor) -> Tensor:
        """Channels `[n, C]` of the first components, `[n, R]`; the others are zero."""
        first = components.shape[1]
        if self.transform is None:
            weighed = functional.pad(components, (0, len(self.mean) - first))
        else:
            weighed = components @ self.transform[:, :first].T
        return by_head(weighed, self._inverse) + self.mean

    @cached_property
    def _inverse(self) -> tuple[Tensor, ...]:
        return tuple(torch.linalg.inv(weight) for weight in self.weights)


@dataclass(frozen=True)
class Basis:
    """A calibrated transform.

    Args:
        fingerprint: of the model.
        geometry: of its cache; the dtype does not matter.
        parts: of every group of layers.
    """

    fingerprint: str
    geometry: Geometry
    parts: tuple[Part, ...]
    digest: str = ""

    def __deepcopy__(self, memo) -> Basis:
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the file's tensors."""
        return sum(tensor.nbytes for tensor in _tensors(self.parts).values())

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        description = {
            "fingerprint": self.fingerprint,
            "producers": self.geometry.producers,
            "heads": self.geometry.heads,
            "dims": self.geometry.dims,
            "members": [part.members for part in self.parts],
        }
        safefile.write(path, FORMAT, description, _tensors(self.parts))

    @classmethod
    def load(cls, path: str | Path) -> Basis:
        """Reads what `save` wrote."""
        found, tensors = safefile.read(path, FORMAT, HOW)
        producers, heads, dims = (tuple(found[name]) for name in ("producers", "heads", "dims"))
        geometry = Geometry(producers, heads, dims, torch.float32)
        parts = []
        for index, members in enumerate(found["members"]):
            weights = (tensors[f"{index}.weight.{number}"].float() for number in range(2 * len(members)))
            mean, transform = (tensors[f"{index}.{name}"].float() for name in ("mean", "transform"))
            parts.append(Part(tuple(members), mean, tuple(weights), transform))
        return cls(found["fingerprint"], geometry, tuple(parts), digest_of(parts))


def groups(geometry: Geometry, channels: int = CHANNELS) -> list[tuple[int, ...]]:
    """Producers in consecutive groups of at most so many channels of keys and values, as even as they go."""
    widths = [2 * width for width in geometry.widths(range(len(geometry.producers)))]
    count = -(-sum(widths) // channels)
    result: list[list[int]] = [[]]
    target, filled = sum(widths) / count, 0
    for place, width in enumerate(widths):
        if result[-1] and filled + width / 2 > target * len(result):
            result.append([])
        result[-1].append(place)
        filled += width
    return [tuple(group) for group in result]


def gather(tensors: KeysValues, members: Sequence[int]) -> Tensor:
    """Channels `[n, C]`, float32, of keys and values `[H, n, D]` of some producers."""
    chosen = [kind[member] for kind in tensors for member in members]
    return torch.cat([tensor.float().transpose(0, 1).flatten(1) for tensor in chosen], dim=1)


def scatter(channels: Tensor, members: Sequence[int], geometry: Geometry) -> tuple[dict[int, Tensor], ...]:
    """The inverse of `gather`: keys and values by producer, `[H, n, D]`."""
    pieces = channels.split(2 * geometry.widths(members), dim=1)
    shaped = [
        piece.view(len(piece), geometry.heads[member], geometry.dims[member]).transpose(0, 1)
        for member, piece in zip((*members, *members), pieces, strict=True)
    ]
    return tuple(dict(zip(members, half, strict=True)) for half in (shaped[: len(members)], shaped[len(members) :]))


def by_head(channels: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Channels `[n, C]`, those of every head times its matrix, of `[H, D, D]`."""
    pieces = channels.split([weight.shape[0] * weight.shape[1] for weight in weights], dim=1)
    turned = [
        torch.einsum("nhd,hde->nhe", piece.unflatten(1, weight.shape[:2]), weight).flatten(1)
        for piece, weight in zip(pieces, weights, strict=True)
    ]
    return torch.cat(turned, dim=1)


def _tensors(parts: Sequence[Part]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for index, part in enumerate(parts):
        assert part.transform is not None
        result[f"{index}.mean"] = part.mean
        # the error of a half precision turn is far below any step
        result[f"{index}.transform"] = part.transform.half()
        result |= {f"{index}.weight.{number}": weight for number, weight in enumerate(part.weights)}
    return result


def digest_of(parts: Sequence[Part]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(parts).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
