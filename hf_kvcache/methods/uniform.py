"""Uniform grids without a rotation: what most libraries offer as a quantised cache, and KIVI (arXiv 2402.02750).

KIVI quantises keys along the tokens of a channel, since their outliers stay in their channels, and values along the
channels of a token; its residual of recent tokens is `residual_length` and the tail. Here for comparison: at equal
bytes `turboquant` is nearer to the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_kvcache.codecs import UniformCodec
from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.methods.turboquant import check_lengths
from hf_kvcache.spec import CacheSpec


@dataclass(frozen=True)
class Uniform(Method):
    """Fills the codecs of all layers with `UniformCodec`.

    Args:
        bits: bits a number, 2, 3, 4 or 8.
        key_bits, value_bits: instead of `bits`, for keys or values alone.
        key_axis: `"channel"`, as KIVI, or `"token"`.
        group_size: numbers that share a step and a zero, which take four bytes.
        residual_length: how many of the latest tokens of a prompt stay dense; none with `every`, and no more than
            eviction always keeps of the shortest prompt of a batch.
        block_size: how many later tokens are encoded at once; 0 leaves all of them dense.
    """

    name: ClassVar[str] = "uniform"
    slot: ClassVar[str] = "codec"
    paper: ClassVar[str] = "arXiv 2402.02750"

    bits: int = 4
    key_bits: int | None = None
    value_bits: int | None = None
    key_axis: str = "channel"
    group_size: int = 64
    residual_length: int = 0
    block_size: int = 128

    def __post_init__(self):
        check_lengths(self.residual_length, self.block_size)
        self.codec()

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        return spec.fill("codec", (self.codec(),) * spec.num_layers, by=self.name)

    def codec(self) -> UniformCodec:
        """The codec of every layer."""
        return UniformCodec(
            self.bits if self.key_bits is None else self.key_bits,
            self.bits if self.value_bits is None else self.value_bits,
            self.key_axis,
            self.group_size,
            self.residual_length,
            self.block_size,
        )
