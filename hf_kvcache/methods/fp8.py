"""Eight-bit floating point keys and values, each entry with a scale: a quarter of float32 at almost no loss.

Common practice rather than a paper; the format is e4m3 of arXiv 2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_kvcache.codecs import Fp8Codec
from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.methods.turboquant import check_lengths
from hf_kvcache.spec import CacheSpec


@dataclass(frozen=True)
class Fp8(Method):
    """Fills the codecs of all layers with `Fp8Codec`.

    Args:
        residual_length: how many of the latest tokens of a prompt stay dense; none with `every`, and no more than
            eviction always keeps of the shortest prompt of a batch.
        block_size: how many later tokens are encoded at once; 0 leaves all of them dense.
    """

    name: ClassVar[str] = "fp8"
    slot: ClassVar[str] = "codec"
    paper: ClassVar[str] = "arXiv 2209.05433"

    residual_length: int = 0
    block_size: int = 128

    def __post_init__(self):
        check_lengths(self.residual_length, self.block_size)
        Fp8Codec()

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        codec = Fp8Codec(self.residual_length, self.block_size)
        return spec.fill("codec", (codec,) * spec.num_layers, by=self.name)
