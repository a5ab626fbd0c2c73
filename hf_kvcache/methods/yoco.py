"""YOCO on an existing model: upper layers own no keys and values and read those of a layer in the middle.

Two things are called YOCO. The original architecture (arXiv 2405.05254), with states of constant size in the lower
half, is a model of its own: `hf_kvcache.models.yoco`. What an existing model can take is the form that YOCO++ (arXiv
2604.13556) starts from: layers 0 to m keep their full KV, layers above m read that of layer m. The cache is m + 1 of L
layers, a half at the published split.

    yoco      layer l > m:       K = K_m,  V = V_m
    yoco++    layer 0:           as it is
              layer l = 1 .. m:  K'_l = lambda (a_l K_0 + b_l K_l),  V'_l = lambda (c_l V_0 + d_l V_l)
              layer l > m:       K = K'_m,  V = V'_m

Keys are mixed after RoPE, the mixed KV is stored, and the layer itself reads it too. a, b, c, d are trainable scalars
of the model, lambda = 35 is fixed, and a = c = 0, b = d = 1/lambda at the start, where yoco++ is yoco. Neither is meant
for a model that was not trained for it: convert it (`hf_kvcache.convert`) or train it.

Different from the reference: any attention implementation, any split, and only layers of one kind share (the
same attention window, and RoPE or none; the source is then the last lower layer of that kind).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.sharing import ResidualPlan, SharingPlan
from hf_kvcache.spec import CacheSpec, LayerKind


@dataclass(frozen=True)
class Yoco(Method):
    """Upper layers read the KV of the middle layer, and are skipped for prompt tokens but the last.

    Args:
        split: how many layers keep their own KV: a share of the layers in (0, 1), or their number.
        early_exit: run the upper layers only for positions whose logits are asked for. Exact.
    """

    name: ClassVar[str] = "yoco"
    slot: ClassVar[str] = "sharing"
    paper: ClassVar[str] = "arXiv 2405.05254, 2604.13556"

    split: int | float = 0.5
    early_exit: bool = True

    def __post_init__(self):
        number = isinstance(self.split, (int, float)) and not isinstance(self.split, bool)
        if not number or self.split <= 0 or (isinstance(self.split, float) and self.split >= 1):
            raise ValueError(
                "split must be a share of the layers between 0 and 1, both excluded, or a number of layers, got "
                f"{self.split!r}"
            )

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        return spec.fill("sharing", self.plan(spec.kinds), by=self.name)

    def plan(self, kinds: tuple[LayerKind, ...]) -> SharingPlan:
        """The plan for a model with layers of these kinds."""
        layers = len(kinds)
        kept = owning_layers(self.split, layers)
        sources = list(range(kept))
        for layer in range(kept, layers):
            below = [source for source in range(kept) if kinds[source] == kinds[layer]]
            if not below:
                raise ValueError(
                    f"layer {layer} has {kinds[layer]}, and none of the {kept} layers that keep their KV has the same; "
                    "raise split"
                )
            sources.append(below[-1])
        return SharingPlan(
            tuple(sources),
            settings={"method": self.name, "split": str(self.split)},
            residual=self.residual(kinds, kept),
            early_exit=self.early_exit,
            part_of_model=True,
        )

    def residual(self, kinds: tuple[LayerKind, ...], kept: int) -> ResidualPlan | None:
        """Which layers add the KV of the bottom layer: none."""
        return None


@dataclass(frozen=True)
class YocoPlusPlus(Yoco):
    """YOCO whose lower layers add the bottom layer's KV to their own, with trainable weights.

    Args:
        residual_scale: lambda, the fixed factor of the trainable weights.
    """

    name: ClassVar[str] = "yoco++"
    paper: ClassVar[str] = "arXiv 2604.13556"

    residual_scale: float = 35.0

    def __post_init__(self):
        super().__post_init__()
        if not self.residual_scale > 0:
            raise ValueError(f"residual_scale must be positive, got {self.residual_scale}")

    def residual(self, kinds: tuple[LayerKind, ...], kept: int) -> ResidualPlan | None:
        """All layers that keep their KV but the bottom one of each kind."""
        sources = [kinds.index(kind) if layer < kept else layer for layer, kind in enumerate(kinds)]
        plan = ResidualPlan(tuple(sources), self.residual_scale)
        return plan if plan.mixing else None


def owning_layers(split: int | float, layers: int) -> int:
    """How many of the layers keep their KV; raises unless that is a whole number and some layer is left to share."""
    count = split if isinstance(split, int) else split * layers
    if abs(count - round(count)) > 1e-6:
        raise ValueError(
            f"split={split} of {layers} layers is {count:g} layers; give the number of layers, {int(count)} or "
            f"{int(count) + 1}"
        )
    if not 0 < round(count) < layers:
        raise ValueError(f"split={split} leaves {round(count)} of {layers} layers with KV, expected 1 to {layers - 1}")
    return round(count)
