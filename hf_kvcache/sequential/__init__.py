"""Sequential KV compression: a codec for *stored, offloaded and shared* caches. It does not shrink the cache that
attention reads: what is adopted from a store is materialised, and then held as the other methods of the spec say.

Two layers (arXiv 2604.15356): prefixes that sessions have in common are stored once, as pages on a trie (`store`), and
each page is coded (`lossless`, `residual`, `tokens`).
"""

from hf_kvcache.sequential.residual import Residual
from hf_kvcache.sequential.store import PrefixStore

__all__ = ["PrefixStore", "Residual"]
