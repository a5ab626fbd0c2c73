"""METHODS: every method by its name. One file and one line here make a new one."""

from hf_kvcache.methods.adakv import AdaKV
from hf_kvcache.methods.criticalkv import CriticalKV
from hf_kvcache.methods.defensivekv import DefensiveKV
from hf_kvcache.methods.eviction_method import EvictionMethod, ScoringMethod
from hf_kvcache.methods.expected_attention import ExpectedAttention
from hf_kvcache.methods.fp8 import Fp8
from hf_kvcache.methods.h2o import H2O
from hf_kvcache.methods.headkv import HeadKV
from hf_kvcache.methods.keydiff import KeyDiff
from hf_kvcache.methods.knorm import Knorm
from hf_kvcache.methods.kvsharer import KVSharer
from hf_kvcache.methods.kvzip import KVzip
from hf_kvcache.methods.lagkv import LagKV
from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.methods.offload import Offload
from hf_kvcache.methods.planned import Planned, TargetRatio
from hf_kvcache.methods.pyramidkv import PyramidKV
from hf_kvcache.methods.random import Random
from hf_kvcache.methods.rkv import RKV
from hf_kvcache.methods.sequential import Sequential
from hf_kvcache.methods.snapkv import SnapKV
from hf_kvcache.methods.streamingllm import StreamingLLM
from hf_kvcache.methods.tova import TOVA
from hf_kvcache.methods.turboquant import TurboQuant
from hf_kvcache.methods.uniform import Uniform
from hf_kvcache.methods.yoco import Yoco, YocoPlusPlus

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        KVSharer,
        Yoco,
        YocoPlusPlus,
        SnapKV,
        StreamingLLM,
        H2O,
        TOVA,
        Knorm,
        KeyDiff,
        LagKV,
        ExpectedAttention,
        RKV,
        DefensiveKV,
        KVzip,
        Random,
        AdaKV,
        PyramidKV,
        HeadKV,
        CriticalKV,
        TurboQuant,
        Uniform,
        Fp8,
        Offload,
        Planned,
        TargetRatio,
        Sequential,
    )
}

__all__ = [
    "H2O",
    "METHODS",
    "RKV",
    "TOVA",
    "AdaKV",
    "CalibrationModel",
    "CriticalKV",
    "DefensiveKV",
    "EvictionMethod",
    "ExpectedAttention",
    "Fp8",
    "HeadKV",
    "KVSharer",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "LagKV",
    "Method",
    "Offload",
    "Planned",
    "PyramidKV",
    "Random",
    "ScoringMethod",
    "Sequential",
    "SnapKV",
    "StreamingLLM",
    "TargetRatio",
    "TurboQuant",
    "Uniform",
    "Yoco",
    "YocoPlusPlus",
]
