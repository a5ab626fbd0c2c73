"""Which tokens are kept: the second axis. A policy is a scorer, an allocator and a selector."""

from hf_kvcache.eviction.observation import Observation, Reading
from hf_kvcache.eviction.perturbation import perturbation_bound
from hf_kvcache.eviction.policy import EvictionPolicy, tokens_to_keep
from hf_kvcache.eviction.roles import Allocator, Global, Scorer, Selector, TopK, Uniform

__all__ = [
    "Allocator",
    "EvictionPolicy",
    "Global",
    "Observation",
    "Reading",
    "Scorer",
    "Selector",
    "TopK",
    "Uniform",
    "perturbation_bound",
    "tokens_to_keep",
]
