"""METHODS: every method by its name. One file and one line here make a new one."""

from hf_kvcache.methods.fp8 import Fp8
from hf_kvcache.methods.kvsharer import KVSharer
from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.methods.offload import Offload
from hf_kvcache.methods.turboquant import TurboQuant
from hf_kvcache.methods.uniform import Uniform

METHODS: dict[str, type[Method]] = {method.name: method for method in (Fp8, KVSharer, Offload, TurboQuant, Uniform)}

__all__ = ["METHODS", "CalibrationModel", "Fp8", "KVSharer", "Method", "Offload", "TurboQuant", "Uniform"]
