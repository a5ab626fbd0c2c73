"""Models of our own, for transformers' Auto classes. Importing this registers them."""

from hf_kvcache.models.yoco import YocoConfig, YocoForCausalLM, YocoModel

__all__ = ["YocoConfig", "YocoForCausalLM", "YocoModel"]
