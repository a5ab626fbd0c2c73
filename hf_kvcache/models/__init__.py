"""Models of our own, for transformers' Auto classes. Importing this registers them."""

from hf_kvcache.models.shared import SharedConfig, SharedForCausalLM
from hf_kvcache.models.yoco import YocoConfig, YocoForCausalLM, YocoModel

__all__ = ["SharedConfig", "SharedForCausalLM", "YocoConfig", "YocoForCausalLM", "YocoModel"]
