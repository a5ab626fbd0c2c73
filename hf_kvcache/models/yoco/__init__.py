"""The original YOCO (arXiv 2405.05254) as a transformers model. Importing this registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_kvcache.models.yoco.configuration_yoco import YocoConfig
from hf_kvcache.models.yoco.modeling_yoco import YocoForCausalLM, YocoModel, YocoPreTrainedModel

AutoConfig.register("yoco", YocoConfig, exist_ok=True)
AutoModel.register(YocoConfig, YocoModel, exist_ok=True)
AutoModelForCausalLM.register(YocoConfig, YocoForCausalLM, exist_ok=True)

__all__ = ["YocoConfig", "YocoForCausalLM", "YocoModel", "YocoPreTrainedModel"]
