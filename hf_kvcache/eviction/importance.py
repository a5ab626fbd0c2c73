"""`HeadImportance`: how much every attention head matters for retrieval, measured once a model and kept as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hf_kvcache import safefile

FORMAT = "hf_kvcache.head_importance/1"


@dataclass(frozen=True, eq=False)
class HeadImportance:
    """The importance of every query head of a model.

    Args:
        values: `[layers, H_q]`, none negative and not all zero; only their proportions count.
        fingerprint: of the model that was measured (see `hf_kvcache.fingerprint`); empty when it fits any.
        settings: how it was measured, as text, for the reader of a saved file.
    """

    values: Tensor
    fingerprint: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        values = self.values
        if not isinstance(values, Tensor) or values.dim() != 2:
            raise ValueError(f"values must be a tensor [layers, query heads], got {getattr(values, 'shape', values)!r}")
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()) or not bool((values > 0).any()):
            raise ValueError("values must be finite, not negative and not all zero; measure them again")

    def of_kv_heads(self, readers: tuple[tuple[int, ...], ...], heads: int) -> Tensor:
        """The share of every KV head in the importance of all, `[len(readers), heads]`, summing to 1.

        A KV head's importance is the mean of the query heads that read it, in all layers that do.

        Args:
            readers: for every layer that keeps a cache of its own, the layers that read it.
            heads: H_kv.
        """
        rows = [self.values[list(layers)].double().unflatten(1, (heads, -1)).mean(dim=(0, 2)) for layers in readers]
        mean = torch.stack(rows)
        return mean / mean.sum().clamp_min(torch.finfo(mean.dtype).tiny)

    def save(self, path: str | Path) -> None:
        """Writes the importance and its fingerprint as a safetensors file."""
        description = {"fingerprint": self.fingerprint, "settings": dict(self.settings)}
        safefile.write(path, FORMAT, description, {"values": self.values})

    @classmethod
    def load(cls, path: str | Path) -> HeadImportance:
        """Reads what `save` wrote; a missing, truncated or foreign file is an error that says so."""
        how_to_make = "measure it with `hf-kvcache calibrate headkv MODEL -o FILE`"
        description, tensors = safefile.read(path, FORMAT, how_to_make)
        return cls(tensors["values"], description["fingerprint"], description["settings"])
