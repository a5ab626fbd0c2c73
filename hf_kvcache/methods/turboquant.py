"""TurboQuant (arXiv 2504.19874): keys and values as codes of randomly rotated vectors, in 2 to 8 bits a number.

A random rotation gives the coordinates of every vector one known law, so one codebook serves all of them: no
calibration and no outliers to keep apart. `mode="paper"` is what was published; `mode="practical"`, the default, keeps
the idea and changes what implementers found wanting. The two codecs, `codecs/turboquant.py` and
`codecs/turboquant_paper.py`, have the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hf_kvcache.codecs import Codec, DenseCodec, PaperTurboQuantCodec, TurboQuantCodec
from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.spec import CacheSpec

Bits = float | Sequence[float]
MODES = ("practical", "paper")
DENSE = 16


@dataclass(frozen=True)
class TurboQuant(Method):
    """Fills the codecs of all layers.

    Args:
        bits: bits a number: 2, 3, 4 or 8; or one for every layer, 16 for a layer that stays as it is. The paper's mode
            also knows 2.5 and 3.5.
        key_bits, value_bits: instead of `bits`, for keys or values alone.
        mode: `"practical"` or `"paper"`.
        variant: of the paper's mode: `"mse"`, or `"prod"` for keys with unbiased inner products.
        outlier_channels: of the paper's 2.5 and 3.5 bits: channels with one bit more; None for half of them.
        boundary_layers: how many of the first and as many of the last layers keep `boundary_bits`.
        boundary_bits: 8, or 16 for layers that stay as they are.
        residual_length: how many of the latest tokens of a prompt stay dense; none with `every`, and no more than
            eviction always keeps of the shortest prompt of a batch.
        block_size: how many later tokens are encoded at once; 0 leaves all of them dense.
        seed: of the rotation.
    """

    name: ClassVar[str] = "turboquant"
    slot: ClassVar[str] = "codec"
    paper: ClassVar[str] = "arXiv 2504.19874"

    bits: Bits = 4
    key_bits: Bits | None = None
    value_bits: Bits | None = None
    mode: str = "practical"
    variant: str = "mse"
    outlier_channels: int | None = None
    boundary_layers: int = 0
    boundary_bits: int = 8
    residual_length: int = 0
    block_size: int = 128
    seed: int = 0

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.mode == "practical" and (self.variant != "mse" or self.outlier_channels is not None):
            raise ValueError("variant and outlier_channels belong to mode='paper', but the mode is 'practical'")
        if self.boundary_bits not in (8, DENSE):
            raise ValueError(f"boundary_bits must be 8 or {DENSE}, got {self.boundary_bits!r}")
        check_lengths(self.residual_length, self.block_size)
        if self.boundary_layers < 0:
            raise ValueError(f"boundary_layers must not be negative, got {self.boundary_layers}")
        widths = list(zip(*self._widths(self._layers_named()), strict=True))
        for key, value in widths:
            self._codec(key, value)
        if self.outlier_channels is not None and all(bits == int(bits) for pair in widths for bits in pair):
            raise ValueError(
                f"outlier_channels belongs to 2.5 and 3.5 bits, of which there are none, got {self.outlier_channels}"
            )

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        return spec.fill("codec", self.codecs(spec.num_layers), by=self.name)

    def codecs(self, num_layers: int) -> tuple[Codec, ...]:
        """The codec of every layer."""
        if 2 * self.boundary_layers > num_layers:
            raise ValueError(
                f"boundary_layers must be at most half of the model's {num_layers} layers, got {self.boundary_layers}"
            )
        inner = range(self.boundary_layers, num_layers - self.boundary_layers)
        return tuple(
            self._codec(key, value) if layer in inner else self._codec(self.boundary_bits, self.boundary_bits)
            for layer, (key, value) in enumerate(zip(*self._widths(num_layers), strict=True))
        )

    def _layers_named(self) -> int:
        """How many layers the lists of bits are for."""
        lists = [bits for bits in (self.bits, self.key_bits, self.value_bits) if isinstance(bits, Sequence)]
        return len(lists[0]) if lists else 1

    def _widths(self, num_layers: int) -> tuple[list[float], list[float]]:
        """Bits of keys and of values by layer."""
        key = self.bits if self.key_bits is None else self.key_bits
        value = self.bits if self.value_bits is None else self.value_bits
        return by_layer("key_bits", key, num_layers), by_layer("value_bits", value, num_layers)

    def _codec(self, key_bits: float, value_bits: float) -> Codec:
        if (key_bits, value_bits) == (DENSE, DENSE):
            return DenseCodec()
        if DENSE in (key_bits, value_bits):
            raise ValueError(f"{DENSE} bits are for keys and values together, got {key_bits} and {value_bits}")
        lengths = {"residual_length": self.residual_length, "block": self.block_size}
        if self.mode == "paper":
            return PaperTurboQuantCodec(
                key_bits, value_bits, self.variant, self.outlier_channels, seed=self.seed, **lengths
            )
        return TurboQuantCodec(key_bits, value_bits, seed=self.seed, **lengths)  # type: ignore[arg-type]


def by_layer(name: str, bits: Bits, num_layers: int) -> list[float]:
    """One width for every layer, from one for all or from a list."""
    widths = list(bits) if isinstance(bits, Sequence) else [bits] * num_layers
    if len(widths) != num_layers:
        raise ValueError(f"{name} must be one number or one for each of {num_layers} layers, got {len(widths)}")
    return widths


def check_lengths(residual_length: int, block_size: int) -> None:
    """Raises when the lengths that a codec's tail is managed by are no numbers of tokens."""
    for name, length in (("residual_length", residual_length), ("block_size", block_size)):
        if not isinstance(length, int) or length < 0:
            raise ValueError(f"{name} must be a number of tokens, 0 or more, got {length!r}")
