"""hf_kvcache: a compressed KV cache for an existing Hugging Face model, in one line.

from hf_kvcache import patch_model
patch_model(model, method="kvsharer")
"""

import os as _os

_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if not _os.path.isdir(_os.path.join(__path__[0], "kernels")) and _os.path.isfile(_os.path.join(_root, "setup.cfg")):
    # a source checkout on a file system without symbolic links
    __path__.append(_root)

from hf_kvcache.api import (  # noqa: E402
    compile_decode,
    compress,
    convert,
    find_plan,
    find_plans,
    is_patched,
    load_cache,
    measure_heads,
    new_cache,
    patch_model,
    unpatch_model,
)
from hf_kvcache.cache import KVCache  # noqa: E402
from hf_kvcache.eviction import HeadImportance  # noqa: E402
from hf_kvcache.methods import (  # noqa: E402
    H2O,
    METHODS,
    RKV,
    TOVA,
    AdaKV,
    CriticalKV,
    DefensiveKV,
    ExpectedAttention,
    Fp8,
    HeadKV,
    KeyDiff,
    Knorm,
    KVSharer,
    KVzip,
    LagKV,
    Method,
    Offload,
    PyramidKV,
    Random,
    ScoringMethod,
    Sequential,
    SnapKV,
    StreamingLLM,
    TurboQuant,
    Uniform,
    Yoco,
    YocoPlusPlus,
)
from hf_kvcache.plan import CachePlan  # noqa: E402
from hf_kvcache.report import CacheReport, report  # noqa: E402
from hf_kvcache.sharing import SharingPlan  # noqa: E402
from hf_kvcache.spec import CacheSpec  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "H2O",
    "METHODS",
    "RKV",
    "TOVA",
    "AdaKV",
    "CachePlan",
    "CacheReport",
    "CacheSpec",
    "CriticalKV",
    "DefensiveKV",
    "ExpectedAttention",
    "Fp8",
    "HeadImportance",
    "HeadKV",
    "KVCache",
    "KVSharer",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "LagKV",
    "Method",
    "Offload",
    "PyramidKV",
    "Random",
    "ScoringMethod",
    "Sequential",
    "SharingPlan",
    "SnapKV",
    "StreamingLLM",
    "TurboQuant",
    "Uniform",
    "Yoco",
    "YocoPlusPlus",
    "compile_decode",
    "compress",
    "convert",
    "find_plan",
    "find_plans",
    "is_patched",
    "load_cache",
    "measure_heads",
    "new_cache",
    "patch_model",
    "report",
    "unpatch_model",
]
