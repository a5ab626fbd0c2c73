"""Which tokens are kept: the second axis. A policy is a scorer, an allocator and a selector."""

from hf_kvcache.eviction.importance import HeadImportance
from hf_kvcache.eviction.observation import Observation, Reading, Rotation
from hf_kvcache.eviction.perturbation import perturbation_bound
from hf_kvcache.eviction.policy import EvictionPolicy, Limits
from hf_kvcache.eviction.roles import Allocator, Global, Scorer, Selector, TopK, Uniform

__all__ = [
    "Allocator",
    "EvictionPolicy",
    "Global",
    "HeadImportance",
    "Limits",
    "Observation",
    "Reading",
    "Rotation",
    "Scorer",
    "Selector",
    "TopK",
    "Uniform",
    "perturbation_bound",
]
