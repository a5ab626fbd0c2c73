"""METHODS: every method by its name. One file and one line here make a new one."""

from hf_kvcache.methods.kvsharer import KVSharer
from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.methods.offload import Offload

METHODS: dict[str, type[Method]] = {method.name: method for method in (KVSharer, Offload)}

__all__ = ["METHODS", "CalibrationModel", "KVSharer", "Method", "Offload"]
