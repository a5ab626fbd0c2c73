"""How an entry of the cache is stored: the third axis. One file per codec."""

from hf_kvcache.codecs.codec import Codec, Payload
from hf_kvcache.codecs.dense import DenseCodec

CODECS = {codec.name: codec for codec in (DenseCodec,)}

__all__ = ["CODECS", "Codec", "DenseCodec", "Payload"]
