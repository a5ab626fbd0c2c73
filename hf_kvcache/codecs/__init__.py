"""How an entry of the cache is stored: the third axis. One file per codec."""

from hf_kvcache.codecs.codec import Codec, Payload
from hf_kvcache.codecs.dense import DenseCodec
from hf_kvcache.codecs.fp8 import Fp8Codec
from hf_kvcache.codecs.turboquant import TurboQuantCodec
from hf_kvcache.codecs.turboquant_paper import PaperTurboQuantCodec
from hf_kvcache.codecs.uniform import UniformCodec

CODECS = {codec.name: codec for codec in (DenseCodec, Fp8Codec, PaperTurboQuantCodec, TurboQuantCodec, UniformCodec)}

__all__ = [
    "CODECS",
    "Codec",
    "DenseCodec",
    "Fp8Codec",
    "PaperTurboQuantCodec",
    "Payload",
    "TurboQuantCodec",
    "UniformCodec",
]
