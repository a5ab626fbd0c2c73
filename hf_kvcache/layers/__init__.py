"""The layers of a `KVCache`: producers that hold KV, sliding producers, states, and consumers that hold nothing.

A layer stands in the place of key and value: `update` returns the layer itself, and the attention function calls its
`attend`. `seen` counts the tokens processed and drives positions and masks; what is held is private to the layer.
"""

from hf_kvcache.layers.consumer import ConsumerLayer
from hf_kvcache.layers.full import KVCacheLayer
from hf_kvcache.layers.settings import LayerSettings
from hf_kvcache.layers.sliding import SlidingLayer
from hf_kvcache.layers.state import StateLayer

__all__ = ["ConsumerLayer", "KVCacheLayer", "LayerSettings", "SlidingLayer", "StateLayer"]
