"""The rotary embedding of a family, as a function that eviction and codecs can apply and undo."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# types whose angles for a token depend on how long the whole sequence is
LENGTH_DEPENDENT = {"dynamic", "longrope"}


def length_dependent(config: Any) -> set[str]:
    """The types of RoPE in the configuration of a decoder whose angles depend on the length of the sequence."""
    kinds = getattr(config, "rope_parameters", None) or {}
    nested = [kind for kind in kinds.values() if isinstance(kind, dict)]
    return {kind.get("rope_type", "default") for kind in nested or [kinds]} & LENGTH_DEPENDENT


@dataclass(frozen=True)
class Rotary:
    """Where a family keeps its rotary embedding, and which of its attention modules apply it.

    Args:
        module: the attribute of the decoder that makes cosines and sines.
        switch: an attribute of the attention module without whose value it does not rotate; None when all of them do.
    """

    module: str = "rotary_emb"
    switch: str | None = None

    def turns(self, attention: nn.Module) -> bool:
        """Whether `attention` applies the embedding."""
        return self.switch is None or bool(getattr(attention, self.switch))

    def of(self, decoder: nn.Module, attention: nn.Module) -> RotaryEmbedding:
        """The embedding that `attention`, a module of `decoder`, applies."""
        return RotaryEmbedding(getattr(decoder, self.module), attention, self.turns(attention))


class RotaryEmbedding:
    """What one attention module does to queries and keys (`hf_kvcache.eviction.Rotation`).

    Holds modules of the model: for the time of a forward, never in a cache.

    Args:
        embedding: the module that makes cosines and sines.
        attention: the module that applies them with the `apply_rotary_pos_emb` of its own file.
        used: False where it does not.
    """

    def __init__(self, embedding: nn.Module, attention: nn.Module, used: bool = True) -> None:
        self.embedding, self.used, self.dim = embedding, used, attention.head_dim
        self.apply: Callable[..., tuple[Tensor, Tensor]] = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self.options = {}
        if "layer_type" in inspect.signature(embedding.forward).parameters:
            self.options["layer_type"] = attention.config.layer_types[attention.layer_idx]

    def __call__(self, vectors: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
        """Vectors `[..., P, D]` before RoPE at positions `[P]` as they are after it, in float32.

        Args:
            vectors: in any dtype.
            positions: of the second but last dimension.
            inverse: go back from after to before.
        """
        vectors = vectors.float()
        if not self.used:
            return vectors
        cosine, sine = self._tables(positions, vectors.device)
        if inverse:
            # some variants also scale, so the way back divides by the square of the scale
            square = cosine.square() + sine.square()
            cosine, sine = cosine / square, -sine / square
        return self._apply(vectors, cosine, sine)

    def mean(self, positions: Tensor) -> Tensor:
        """The mean over positions `[P]` of the matrices `[D, D]` by which RoPE multiplies row vectors."""
        unit = torch.eye(self.dim, device=positions.device)
        if not self.used:
            return unit
        cosine, sine = (table.mean(1, keepdim=True) for table in self._tables(positions, positions.device))
        return self._apply(unit.unsqueeze(1), cosine, sine).squeeze(1)

    def _apply(self, vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        flat = vectors.reshape(1, -1, *vectors.shape[-2:])
        return self.apply(flat, flat[:, :1], cosine, sine)[0].view(vectors.shape)

    def _tables(self, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[1, P, rotated part of D]`."""
        # below the decorators: dynamic variants would change their frequencies to suit the positions asked for and keep
        # that; the frequencies wanted are those of the present forward
        forward = inspect.unwrap(type(self.embedding).forward)
        return forward(self.embedding, torch.empty(0, device=device), positions.to(device)[None], **self.options)
