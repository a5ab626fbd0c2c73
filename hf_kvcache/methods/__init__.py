"""METHODS: every method by its name. One file and one line here make a new one."""

from hf_kvcache.methods.adakv import AdaKV
from hf_kvcache.methods.criticalkv import CriticalKV
from hf_kvcache.methods.eviction_method import EvictionMethod, ScoringMethod
from hf_kvcache.methods.kvsharer import KVSharer
from hf_kvcache.methods.kvzip import KVzip
from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.methods.offload import Offload
from hf_kvcache.methods.snapkv import SnapKV

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (KVSharer, SnapKV, AdaKV, CriticalKV, KVzip, Offload)
}

__all__ = [
    "METHODS",
    "AdaKV",
    "CalibrationModel",
    "CriticalKV",
    "EvictionMethod",
    "KVSharer",
    "KVzip",
    "Method",
    "Offload",
    "ScoringMethod",
    "SnapKV",
]
