"""How each library prefills a prompt, and what it holds then: ours, transformers, kvpress.

A method's name is that of our methods where it is the same algorithm: `adakv+criticalkv` is kvpress'
`CriticalAdaKVPress(SnapKVPress(...))`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from peer_protocol import PREFIX, Document, token_by_token
from torch import Tensor

from hf_kvcache.measure import Continuation, continued
from hf_kvcache.testing import live_bytes, live_tensors


class Backend:
    """The unpatched model with transformers' default cache; the others change what differs."""

    def __init__(self, model: Any, tokenizer: Any, method: str, kept: float | None) -> None:
        self.model, self.tokenizer, self.method, self.kept = model, tokenizer, method, kept

    def prefill(self, ids: Tensor) -> Any:
        """The cache that holds `ids` `[1, T]`."""
        return self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def fresh(self, cache: Any, document: Document) -> Any:
        """A copy of a cache; one that cannot be copied is filled anew."""
        try:
            return copy.deepcopy(cache)
        except RuntimeError:
            return self.prefill(document.prefix)

    def continued(self, cache: Any, ids: Tensor, document: Document) -> Continuation:
        """Scores `ids` `[1, T]` after the document's prefix on a fresh copy of its cache."""
        return continued(self.model, self.fresh(cache, document), ids, PREFIX)

    def held(self, cache: Any) -> Any:
        """The cache, and what is kept for it elsewhere."""
        return cache

    def held_bytes(self, cache: Any) -> int:
        """Bytes of all storages that the cache keeps alive."""
        return live_bytes(self.held(cache))

    def times_smaller(self, cache: Any, tokens: int) -> float:
        """How many times smaller a cache of so many tokens is than one that keeps everything, in a model in 16 bits."""
        config = self.model.config
        width = 2 * config.num_key_value_heads * (self.model.model.layers[0].self_attn.head_dim)
        return 2 * config.num_hidden_layers * tokens * width / bytes_in_16_bit(self.held(cache))

    def close(self) -> None:
        """Leaves the model as it was."""


def bytes_in_16_bit(root: Any) -> int:
    """`live_bytes` as they are where the model is in 16 bits: what is held in float32 takes half of it."""
    sizes = {}
    for tensor in live_tensors(root):
        if tensor.dim():
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes() // (2 if tensor.dtype == torch.float32 else 1)
    return sum(sizes.values())


class Ours(Backend):
    """A patched model. A method is `name` or `name{"option": value}`; `kept` goes to `budget`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        from hf_kvcache import patch_model

        found = re.fullmatch(r"([^{]+)(\{.*\})?", self.method)
        if found is None:
            raise ValueError(f'a method of ours is NAME or NAME{{"option": value}}, got {self.method!r}')
        options = json.loads(found[2] or "{}")
        if self.kept is not None:
            options["budget"] = self.kept
        patch_model(self.model, None if found[1] == "none" else found[1], tokenizer=self.tokenizer, **options)

    def close(self) -> None:
        from hf_kvcache import unpatch_model

        unpatch_model(self.model)


class Transformers(Backend):
    """Transformers' own caches: `dynamic`, `fp8`, and `quanto4`, `hqq4`, ... with that many bits."""

    def prefill(self, ids: Tensor) -> Any:
        from transformers import DynamicCache, QuantizedCache

        if self.method == "dynamic":
            cache = DynamicCache(config=self.model.config)
        elif self.method == "fp8":
            cache = QuantizedCache("fp8", self.model.config)
        elif found := re.fullmatch(r"(quanto|hqq)(\d)", self.method):
            axes = {"axis_key": 1, "axis_value": 1} if found[1] == "hqq" else {}
            cache = QuantizedCache(found[1], self.model.config, nbits=int(found[2]), **axes)
        else:
            raise ValueError(f"a cache of transformers is dynamic, fp8, quantoN or hqqN, got {self.method!r}")
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache


class KVPress(Backend):
    """A press of kvpress around the prefill."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.method not in PRESSES:
            raise ValueError(f"unknown press {self.method!r}; available: {', '.join(PRESSES)}")
        import kvpress
        from kvpress.presses import kvzip_press

        if self.kept is None:
            raise ValueError(f"{self.method!r} of kvpress needs --kept")
        self.press = PRESSES[self.method](kvpress, 1 - self.kept)
        # it would load a tokenizer by the model's path, which gives another one
        kvzip_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_: self.tokenizer)

    def prefill(self, ids: Tensor) -> Any:
        from transformers import DynamicCache

        self.close()
        cache = DynamicCache(config=self.model.config)
        with self.press(self.model):
            # the decoder alone: logits of the prefix are of no use
            self.model.model(input_ids=ids, past_key_values=cache)
        return cache

    def continued(self, cache: Any, ids: Tensor, document: Document) -> Continuation:
        try:
            return super().continued(cache, ids, document)
        except ValueError:
            # head-wise presses find no stand-in key for many queries at once, and need the masks of the prefill
            return token_by_token(self.model, self.prefill(document.prefix), ids, PREFIX)

    def held(self, cache: Any) -> Any:
        masks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in self.model.model.layers]
        return [cache, *(mask for mask in masks if mask is not None)]

    def close(self) -> None:
        for layer in self.model.model.layers:
            layer.self_attn.masked_key_indices = None


PRESSES: dict[str, Callable[[Any, float], Any]] = {
    "random": lambda k, ratio: k.RandomPress(ratio),
    "streamingllm": lambda k, ratio: k.StreamingLLMPress(ratio),
    "knorm": lambda k, ratio: k.KnormPress(ratio),
    "keydiff": lambda k, ratio: k.KeyDiffPress(ratio),
    "lagkv": lambda k, ratio: k.LagKVPress(ratio),
    "tova": lambda k, ratio: k.TOVAPress(ratio),
    "snapkv": lambda k, ratio: k.SnapKVPress(ratio),
    "pyramidkv": lambda k, ratio: k.PyramidKVPress(ratio),
    "expected_attention": lambda k, ratio: k.ExpectedAttentionPress(ratio),
    "snapkv+criticalkv": lambda k, ratio: k.CriticalKVPress(k.SnapKVPress(ratio)),
    "adakv": lambda k, ratio: k.AdaKVPress(k.SnapKVPress(ratio)),
    "adakv+criticalkv": lambda k, ratio: k.CriticalAdaKVPress(k.SnapKVPress(ratio)),
    "kvzip": lambda k, ratio: k.KVzipPress(ratio),
}
BACKENDS: dict[str, type[Backend]] = {"ours": Ours, "transformers": Transformers, "kvpress": KVPress}
DEFAULTS = {
    "ours": ["none"],
    "transformers": ["dynamic", "fp8", "quanto4", "hqq4"],
    "kvpress": ["snapkv", "snapkv+criticalkv", "adakv", "adakv+criticalkv", "kvzip"],
}


def missing(backend: str, method: str) -> str | None:
    """Why a method cannot run here, or None."""
    package = {"quanto": "optimum", "hqq": "hqq"}.get(re.sub(r"\d$", "", method)) if backend == "transformers" else None
    package = "kvpress" if backend == "kvpress" else package
    if package and find_spec(package) is None:
        return f"{package} is not installed"
    return None


@contextlib.contextmanager
def opened(backend: str, *args: Any):
    """The method of a back end on a model, which is left as it was in the end."""
    method = BACKENDS[backend](*args)
    try:
        with torch.inference_mode():
            yield method
    finally:
        method.close()
