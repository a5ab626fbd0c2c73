"""Reading a model whose layers share KV by a plan that is part of it (`patches/saving.py` writes it).

`AutoModelForCausalLM.from_pretrained(folder)` works once `hf_kvcache.models` is imported: what it returns is a model of
the original family with the plan attached, as `patch_model` and `convert` leave it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from hf_kvcache.api import attach_plan
from hf_kvcache.patches.residual import ATTRIBUTE
from hf_kvcache.patches.saving import ENTRY, MODEL_TYPE, plan_of

# what `from_pretrained` takes to say where files are, beside the name
PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# what `from_pretrained` takes for itself, though configurations have fields of these names
KEPT = ("dtype", "torch_dtype", "quantization_config")
# what a configuration is told when it is loaded and does not save
CHOICES = ("_attn_implementation", "_experts_implementation")


class SharedConfig(PreTrainedConfig):
    """The configuration of the original family, with the plan in the field `hf_kvcache`."""

    model_type = MODEL_TYPE

    def original(self) -> PreTrainedConfig:
        """The configuration in the class of its own family."""
        entry = getattr(self, ENTRY, None)
        if not isinstance(entry, dict):
            raise ValueError(
                f"this configuration has the model type {MODEL_TYPE!r} but no field {ENTRY!r} with the plan; "
                "save the model again with save_pretrained"
            )
        fields = {name: value for name, value in self.to_dict().items() if name != ENTRY}
        config = AutoConfig.for_model(**{**fields, "model_type": entry["model_type"]})
        for name in CHOICES:
            if getattr(self, name, None) is not None:
                setattr(config, name, getattr(self, name))
        return config

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token in the cache in 16 bit, where no layer has a window: only producers keep any."""
        original = self.original()
        sources = plan_of(getattr(self, ENTRY)).source_layers
        return len(set(sources)) * layer_bytes_per_token(original)


def layer_bytes_per_token(config: PreTrainedConfig) -> int:
    """Bytes that one layer with its own KV keeps of a token in 16 bit."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) * 2


class SharedForCausalLM:
    """What the Auto class calls: loads a model of the original family and attaches the plan."""

    config_class = SharedConfig

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *args: Any, config: SharedConfig | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Loads the model; raises when weights are missing or of another configuration."""
        place = {name: kwargs[name] for name in PLACE if kwargs.get(name) is not None}
        config = config or SharedConfig.from_pretrained(folder, **place)
        original = config.original()
        # a field that is not in the file, as it has its default, is one of the family's configuration only
        for name in set(kwargs) - set(KEPT):
            if hasattr(original, name):
                setattr(original, name, kwargs.pop(name))
        family = AutoModelForCausalLM._model_mapping[type(original)]
        wants_info = kwargs.pop("output_loading_info", False)
        with _quiet():
            # the residual weights are not known to the family, which would warn
            model, info = family.from_pretrained(folder, *args, config=original, output_loading_info=True, **kwargs)
        unknown = [name for name in info["unexpected_keys"] if f".{ATTRIBUTE}." not in name]
        wrong = [*info["missing_keys"], *info["mismatched_keys"], *unknown]
        if wrong:
            raise ValueError(
                f"{folder} is not the checkpoint of its configuration: {sorted(map(str, wrong))[:3]} are missing, "
                "unknown or of another shape; load the folder as save_pretrained wrote it"
            )
        attach_plan(model, plan_of(getattr(config, ENTRY)))
        # what has been loaded just now is not downloaded again
        place.pop("force_download", None)
        weights = dict(_residual_weights(folder, kwargs.get("variant"), place))
        own = {name: weight for name, weight in model.named_parameters() if f".{ATTRIBUTE}." in name}
        if set(weights) != set(own):
            raise ValueError(
                f"{folder} has residual weights {sorted(weights)[:3]}..., its plan asks for {sorted(own)[:3]}...; "
                "load the folder as save_pretrained wrote it"
            )
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(weights[name])
        return (model, info) if wants_info else model

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a model with shared KV is made by patch_model or convert, or loaded with from_pretrained")


def _residual_weights(folder: str | Path, variant: str | None, place: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The weights that the family does not know, of a folder or of a repository, as `cached_file` finds them."""
    for name in _weight_files(folder, variant, place):
        with safe_open(str(cached_file(folder, name, **place)), framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys() if f".{ATTRIBUTE}." in name)  # noqa: SIM118


def _weight_files(folder: str | Path, variant: str | None, place: dict[str, Any]) -> list[str]:
    """The names of the files that may hold such weights: the only one, or those of the index."""
    whole, index = (_with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if cached_file(folder, whole, **place, _raise_exceptions_for_missing_entries=False) is not None:
        return [whole]
    path = cached_file(folder, index, **place, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return []
    files = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
    return sorted({file for name, file in files.items() if f".{ATTRIBUTE}." in name})


def _with_variant(name: str, variant: str | None) -> str:
    """As transformers names the files of a variant: it stands before the last ending."""
    return name if variant is None else f".{variant}.".join(name.rsplit(".", 1))


@contextmanager
def _quiet() -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


AutoConfig.register(MODEL_TYPE, SharedConfig, exist_ok=True)
AutoModelForCausalLM.register(SharedConfig, SharedForCausalLM, exist_ok=True)
