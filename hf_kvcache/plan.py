"""`CachePlan`: one choice for every layer and head of a model, as `hf-kvcache tune` measures and saves it.

A plan is data: which layers share, how much of a context every KV head keeps by which score, and how many bits every
layer spends on keys and on values. `methods/planned.py` turns it into the methods that do so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hf_kvcache import safefile
from hf_kvcache.sharing import SharingPlan

FORMAT = "hf_kvcache.cache_plan/1"
DENSE = 16
WIDTHS = (2, 3, 4, 8, DENSE)


@dataclass(frozen=True, eq=False)
class CachePlan:
    """What every layer and head of a model stores.

    Args:
        kept: the share of a context that each KV head keeps, `[layers, H_kv]`, in (0, 1]. Rows of layers with a sliding
            window and of consumers are not looked at; `tune` writes 1 there, and 16 bits.
        bits: of keys and of values, `[layers, 2]`: 2, 3, 4 or 8; 16 and 16 for a layer that stays as it is.
        scorer: name of the method that says which tokens a head keeps; not used where all shares are 1.
        sharing: which layers read the KV of others; None for none.
        fingerprint: of the model the plan was made for (see `hf_kvcache.fingerprint`); empty when it fits any.
        settings: how it was made and what was measured, as text, for the reader of a saved file.

    Example:
        >>> plan = CachePlan(torch.full((30, 3), 0.5), torch.full((30, 2), 4))
        >>> plan.save("plan.safetensors")
        >>> patch_model(model, plan="plan.safetensors")
    """

    kept: Tensor
    bits: Tensor
    scorer: str = "kvzip"
    sharing: SharingPlan | None = None
    fingerprint: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        kept, bits = self.kept, self.bits
        if kept.dim() != 2 or bits.shape != (len(kept), 2):
            raise ValueError(
                f"kept must be [layers, heads] and bits [layers, 2] of the same layers, got {tuple(kept.shape)} and "
                f"{tuple(bits.shape)}"
            )
        if not bool(((kept > 0) & (kept <= 1)).all()):
            raise ValueError("kept holds shares of a context, each in (0, 1]")
        for layer, (key, value) in enumerate(bits.tolist()):
            if key not in WIDTHS or value not in WIDTHS or (key == DENSE) != (value == DENSE):
                raise ValueError(
                    f"layer {layer} has {key} bits for keys and {value} for values; expected 2, 3, 4 or 8 for each, or "
                    f"{DENSE} for both"
                )
        if self.sharing is not None and self.sharing.num_layers != len(kept):
            raise ValueError(f"the plan has {len(kept)} layers and its sharing {self.sharing.num_layers}")

    @property
    def num_layers(self) -> int:
        return len(self.kept)

    @property
    def evicts(self) -> bool:
        """Whether some head keeps less than everything."""
        return bool((self.kept[self._producers] < 1).any())

    def summary(self) -> str:
        """The plan in one line."""
        parts = []
        if self.sharing is not None and self.sharing.consumers:
            pairs = ", ".join(f"{layer}<-{self.sharing.source_layers[layer]}" for layer in self.sharing.consumers)
            parts.append(f"shared layers {pairs}")
        rows = self._producers
        changed = [row for row in rows if self.bits[row, 0] != DENSE or bool((self.kept[row] < 1).any())]
        if self.evicts:
            kept = self.kept[changed]
            low, mean, high = float(kept.min()), float(kept.mean()), float(kept.max())
            shares = f"{mean:.0%}" if low == high else f"{mean:.0%} on average ({low:.0%} to {high:.0%})"
            parts.append(f"{self.scorer} keeps {shares}")
        for name, widths in zip(("keys", "values"), self.bits[changed].T.tolist()):
            counted = ", ".join(f"{width} x {widths.count(width)}" for width in sorted(set(widths), reverse=True))
            if widths:
                parts.append(f"{name} in {widths[0] if len(set(widths)) == 1 else counted} bits")
        if len(changed) < len(rows):
            parts.append(f"{len(rows) - len(changed)} of {self.num_layers} layers as they are")
        return "; ".join(parts)

    @property
    def _producers(self) -> list[int]:
        """The layers that store something: of the others no row is looked at."""
        consumers = () if self.sharing is None else self.sharing.consumers
        return [layer for layer in range(self.num_layers) if layer not in consumers]

    def save(self, path: str | Path) -> None:
        """Writes the plan, healed weights and fingerprint as one safetensors file."""
        sharing = self.sharing or SharingPlan.identity(self.num_layers)
        description = {
            "fingerprint": self.fingerprint,
            "scorer": self.scorer,
            "source_layers": sharing.source_layers,
            "settings": dict(self.settings),
        }
        healed = {f"healed.{name}": weight for name, weight in sharing.healed.items()}
        safefile.write(path, FORMAT, description, {"kept": self.kept, "bits": self.bits, **healed})

    @classmethod
    def load(cls, path: str | Path) -> CachePlan:
        """Reads a plan that `save` wrote; a missing, truncated or foreign file is an error that says so."""
        description, tensors = safefile.read(path, FORMAT, "make a plan with `hf-kvcache tune MODEL -o FILE`")
        healed = {
            name.removeprefix("healed."): weight for name, weight in tensors.items() if name.startswith("healed.")
        }
        sharing = SharingPlan(tuple(description["source_layers"]), healed, description["fingerprint"])
        return cls(
            tensors["kept"],
            tensors["bits"],
            description["scorer"],
            None if sharing.is_identity else sharing,
            description["fingerprint"],
            description["settings"],
        )

    @classmethod
    def uniform(cls, layers: int, heads: int, kept: float, key_bits: int, value_bits: int, **kwargs) -> CachePlan:
        """The plan that treats all layers and heads alike."""
        bits = torch.tensor([[key_bits, value_bits]]).expand(layers, 2).clone()
        return cls(torch.full((layers, heads), kept), bits, **kwargs)
