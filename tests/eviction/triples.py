"""What the laws of eviction are checked on: scorers, allocators and selectors by name, and random observations."""

from dataclasses import replace

import torch

from hf_kvcache.eviction import HeadImportance, TopK, Uniform
from hf_kvcache.methods import METHODS
from hf_kvcache.testing import random_observation

SCORERS = [name for name, method in METHODS.items() if method.slot == "scorer"]
ALLOCATORS = [name for name, method in METHODS.items() if method.slot == "allocator"]
SELECTORS = [name for name, method in METHODS.items() if method.slot == "selector"]
DECODING = [name for name in SCORERS if METHODS[name].while_decoding]
# (scorer, allocator, selector): each alone, and all that CriticalKV was published with
TRIPLES = [
    *((scorer, "uniform", "top-k") for scorer in SCORERS),
    *((scorer, "adakv", "criticalkv") for scorer in SCORERS),
    *(("snapkv", allocator, selector) for allocator in ALLOCATORS for selector in ("top-k", *SELECTORS)),
]
# small enough for prompts of some forty tokens
SMALL = {
    "snapkv": {"window": 6},
    "defensivekv": {"window": 6},
    "rkv": {"window": 4, "every": None},
    "lagkv": {"lag": 8},
    "expected_attention": {"horizon": 8},
    "knorm": {"sinks": 2, "window": 3},
    "kvzip": {"instructions": ((5, 6, 7), (8, 9)), "chunk": 16},
}
LENGTH = 40


class NoRotation:
    """Stands for the rotary embedding of a layer that has none."""

    def __call__(self, vectors, positions, inverse=False):
        return vectors.float()

    def mean(self, positions):
        return torch.eye(8)


def build(name: str, **options):
    if name in ("uniform", "top-k"):
        return {"uniform": Uniform(), "top-k": TopK()}[name]
    if name == "headkv":
        options = {
            "importance": HeadImportance(torch.rand(4, 6, generator=torch.Generator().manual_seed(3))),
            **options,
        }
    return METHODS[name](**{**SMALL.get(name, {}), **options})


def methods_of(triple, **options):
    """Method instances for `patch_model`; the scorer carries the budget."""
    scorer, *others = triple
    return [build(scorer, **options), *(build(name) for name in others if name not in ("uniform", "top-k"))]


def observe(**fields):
    observed = random_observation(tokens=LENGTH, queries=LENGTH, heads=2, **fields)
    readings = [replace(reading, rotate=NoRotation()) for reading in observed.readings]
    return replace(observed, readings=readings, replayed=observed.key.norm(dim=-1))


def layers_of(policy, num_layers=4, **fields):
    """What the policy keeps in each of several layers, `[B, H_kv, T]`, all when it drops nothing."""
    readers = tuple((layer,) for layer in range(num_layers))
    for layer in range(num_layers):
        observed = observe(layer=layer, num_layers=num_layers, readers=readers, seed=layer, **fields)
        decided = policy.keep(observed)
        yield observed, torch.ones(observed.key.shape[:3], dtype=torch.bool) if decided is None else decided[0]
