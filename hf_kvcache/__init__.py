"""hf_kvcache: a compressed KV cache for an existing Hugging Face model, in one line.

from hf_kvcache import patch_model
patch_model(model, method="kvsharer")
"""

import os as _os

_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if not _os.path.isdir(_os.path.join(__path__[0], "kernels")) and _os.path.isfile(_os.path.join(_root, "setup.cfg")):
    # a source checkout on a file system without symbolic links
    __path__.append(_root)

from hf_kvcache.api import find_plan, find_plans, is_patched, load_cache, new_cache, patch_model, unpatch_model  # noqa: E402
from hf_kvcache.cache import KVCache  # noqa: E402
from hf_kvcache.methods import METHODS, Fp8, KVSharer, Method, Offload, TurboQuant, Uniform  # noqa: E402
from hf_kvcache.report import CacheReport, report  # noqa: E402
from hf_kvcache.sharing import SharingPlan  # noqa: E402
from hf_kvcache.spec import CacheSpec  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "CacheReport",
    "CacheSpec",
    "KVCache",
    "KVSharer",
    "Method",
    "Offload",
    "SharingPlan",
    "find_plan",
    "find_plans",
    "is_patched",
    "load_cache",
    "new_cache",
    "patch_model",
    "report",
    "unpatch_model",
]
