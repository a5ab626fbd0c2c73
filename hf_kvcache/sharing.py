"""Which layers store keys and values: `SharingPlan`, the first of the four axes of a cache.

`source_layers[i]` is the layer whose KV layer i reads. A layer that reads its own is a *producer*, any other a
*consumer*. Every source is itself a producer: chains are resolved when a plan is made, so that reading a plan never
needs a walk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_kvcache import safefile

FORMAT = "hf_kvcache.sharing_plan/1"


@dataclass(frozen=True)
class ResidualPlan:
    """Which layers add the KV of a lower layer to their own before it is stored and read (YOCO++).

    Args:
        sources: for every layer the layer whose KV it adds, itself where it adds none.
        scale: lambda, the fixed factor of the trainable weights.
    """

    sources: tuple[int, ...]
    scale: float

    @property
    def mixing(self) -> tuple[int, ...]:
        """The layers that add another one's KV, in order."""
        return tuple(layer for layer, source in enumerate(self.sources) if layer != source)


@dataclass(frozen=True, eq=False)
class SharingPlan:
    """A map from layers to the layers whose KV they read, with the weights healed for it.

    Args:
        source_layers: for every layer the index of the layer whose KV it reads, itself for a producer.
        healed: replacement weights, by module path below the decoder (`"layers.7.self_attn.o_proj"`), of shape
            `[out_features, in_features]`. Empty when nothing was healed.
        fingerprint: of the model the plan was made for (see `hf_kvcache.fingerprint`); empty when it fits any model
            of this depth.
        settings: how the plan was found, as text, for the reader of a saved file.
        residual: which producers add the KV of a lower layer; None for none.
        early_exit: whether layers above the last producer run only for the positions whose logits are asked for.
        part_of_model: whether the plan is trained and saved with the model, and stays when other methods are named.

    Example:
        >>> plan = SharingPlan.from_pairs(4, [(3, 1), (1, 0)])
        >>> plan.source_layers
        (0, 0, 2, 0)
        >>> plan.consumers
        (1, 3)
    """

    source_layers: tuple[int, ...]
    healed: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fingerprint: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    residual: ResidualPlan | None = None
    early_exit: bool = False
    part_of_model: bool = False

    def __post_init__(self):
        for layer, source in enumerate(self.source_layers):
            if not 0 <= source < len(self.source_layers):
                raise ValueError(
                    f"source_layers[{layer}] must be a layer index below {len(self.source_layers)}, got {source}"
                )
            if source > layer:
                raise ValueError(
                    f"a layer can only read the KV of itself or of an earlier layer, but layer {layer} reads layer "
                    f"{source}; swap the pair"
                )
            if self.source_layers[source] != source:
                raise ValueError(
                    f"layer {layer} reads layer {source}, which reads layer {self.source_layers[source]} itself; "
                    "resolve the chain, for example with SharingPlan.from_pairs"
                )

    @classmethod
    def identity(cls, num_layers: int) -> SharingPlan:
        """The plan in which every layer keeps its own KV."""
        return cls(tuple(range(num_layers)))

    @classmethod
    def from_pairs(cls, num_layers: int, pairs: Iterable[tuple[int, int]], **kwargs) -> SharingPlan:
        """Makes a plan from (consumer, source) pairs; a chain of pairs resolves to the layer that owns its KV."""
        parent = list(range(num_layers))
        for consumer, source in pairs:
            if not (0 <= source < consumer < num_layers):
                raise ValueError(
                    f"a pair must be (consumer, source) with 0 <= source < consumer < {num_layers}, "
                    f"got ({consumer}, {source})"
                )
            parent[consumer] = source
        # sources lie below their consumers, so one pass upwards resolves every chain
        for layer in range(num_layers):
            parent[layer] = parent[parent[layer]]
        return cls(tuple(parent), **kwargs)

    @property
    def num_layers(self) -> int:
        return len(self.source_layers)

    @property
    def consumers(self) -> tuple[int, ...]:
        """The layers that store nothing, in order."""
        return tuple(layer for layer, source in enumerate(self.source_layers) if source != layer)

    @property
    def is_identity(self) -> bool:
        return not self.consumers

    @property
    def upper(self) -> tuple[int, ...]:
        """The layers above the last producer: all of them consumers."""
        return tuple(range(max(self.source_layers) + 1, self.num_layers))

    @property
    def last_reader(self) -> dict[int, int]:
        """For every producer the last layer that reads its KV."""
        return {source: layer for layer, source in enumerate(self.source_layers)}

    def save(self, path: str | Path) -> None:
        """Writes the plan, its healed weights and its fingerprint as one safetensors file."""
        if self.part_of_model:
            raise ValueError(
                "this plan is part of a model and may have trained weights there; save the model with save_pretrained"
            )
        description = {
            "source_layers": self.source_layers,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
        }
        safefile.write(path, FORMAT, description, dict(self.healed))

    @classmethod
    def load(cls, path: str | Path) -> SharingPlan:
        """Reads a plan that `save` wrote; a missing, truncated or foreign file is an error that says so."""
        how_to_make = "make a plan with `hf-kvcache calibrate kvsharer MODEL -o FILE`"
        description, healed = safefile.read(path, FORMAT, how_to_make)
        return cls(tuple(description["source_layers"]), healed, description["fingerprint"], description["settings"])
