"""`Basis`: how keys and values are turned into few large and many small numbers, by one calibration a model.

Keys without RoPE and values hang together across layers and heads. Layers are taken in groups; in each, keys and values
apart, the mean is subtracted, the channels of each layer divided by their deviation, and the vector of all channels
turned by an orthonormal matrix (principal components), largest first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_kvcache import safefile
from hf_kvcache.sequential.page import Geometry

FORMAT = "hf_kvcache.basis/1"
HOW = "make one with hf-kvcache calibrate sequential"
# channels of a group: what a matrix product and a file bear
CHANNELS = 2048


@dataclass(frozen=True)
class Part:
    """Keys, or values, of one group of layers.

    Args:
        kind: 0 for keys, 1 for values.
        members: which producers, counted from 0, in order.
        mean, scale: of every channel, `[C]`; channels are ordered by producer, head, dimension.
        transform: `[C, C]`, a component in every column, the largest first; None to leave channels as they are.
        deviation: of every component, `[C]`, in units of the scaled channels; sorts them.
    """

    kind: int
    members: tuple[int, ...]
    mean: Tensor
    scale: Tensor
    transform: Tensor | None
    deviation: Tensor

    def forward(self, channels: Tensor) -> Tensor:
        """Components `[n, C]` of channels `[n, C]`."""
        scaled = (channels - self.mean) / self.scale
        return scaled if self.transform is None else scaled @ self.transform

    def backward(self, components: Tensor) -> Tensor:
        """The inverse of `forward`."""
        scaled = components if self.transform is None else components @ self.transform.T
        return scaled * self.scale + self.mean


@dataclass(frozen=True)
class Basis:
    """A calibrated transform.

    Args:
        fingerprint: of the model.
        geometry: of its cache; the dtype does not matter.
        parts: keys and values of every group.
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
            "parts": [{"kind": part.kind, "members": part.members} for part in self.parts],
        }
        safefile.write(path, FORMAT, description, _tensors(self.parts))

    @classmethod
    def load(cls, path: str | Path) -> Basis:
        """Reads what `save` wrote."""
        found, tensors = safefile.read(path, FORMAT, HOW)
        producers, heads, dims = (tuple(found[name]) for name in ("producers", "heads", "dims"))
        geometry = Geometry(producers, heads, dims, torch.float32)
        parts = tuple(
            Part(
                described["kind"],
                tuple(described["members"]),
                *(tensors[f"{index}.{name}"].float() for name in ("mean", "scale", "transform", "deviation")),
            )
            for index, described in enumerate(found["parts"])
        )
        return cls(found["fingerprint"], geometry, parts, digest_of(parts))


def groups(geometry: Geometry, channels: int = CHANNELS) -> list[tuple[int, ...]]:
    """Producers in consecutive groups of at most so many channels, as even as they go."""
    widths = geometry.widths(range(len(geometry.producers)))
    count = -(-sum(widths) // channels)
    result: list[list[int]] = [[]]
    target, filled = sum(widths) / count, 0
    for place, width in enumerate(widths):
        if result[-1] and filled + width / 2 > target * len(result):
            result.append([])
        result[-1].append(place)
        filled += width
    return [tuple(group) for group in result]


def gather(tensors: Sequence[Tensor], members: Sequence[int]) -> Tensor:
    """Channels `[n, C]`, float32, of keys or values `[H, n, D]` of some producers."""
    return torch.cat([tensors[member].float().transpose(0, 1).flatten(1) for member in members], dim=1)


def scatter(channels: Tensor, members: Sequence[int], geometry: Geometry) -> dict[int, Tensor]:
    """The inverse of `gather`: by producer `[H, n, D]`."""
    pieces = channels.split(geometry.widths(members), dim=1)
    return {
        member: piece.view(len(piece), geometry.heads[member], geometry.dims[member]).transpose(0, 1)
        for member, piece in zip(members, pieces, strict=True)
    }


def _tensors(parts: Sequence[Part]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for index, part in enumerate(parts):
        assert part.transform is not None
        result |= {f"{index}.{name}": getattr(part, name) for name in ("mean", "scale", "deviation")}
        # the error of a half precision turn is far below any step
        result[f"{index}.transform"] = part.transform.half()
    return result


def digest_of(parts: Sequence[Part]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(parts).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
