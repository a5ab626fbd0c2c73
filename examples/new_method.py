"""A method of your own: keep the sealed cache in half precision, whatever the model computes in.

A method is a frozen dataclass that fills one slot of the spec; here the slot is the codec. No registry is needed.

    python examples/new_method.py
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_kvcache import Method, patch_model, report, smollm2
from hf_kvcache.codecs import DenseCodec


@dataclass(frozen=True)
class HalfCodec(DenseCodec):
    """Stores entries in float16 and attends over them in the dtype of the query."""

    name: ClassVar[str] = "half"

    def encode(self, key, value, owners=None, like=None):
        return super().encode(key.half(), value.half())

    def attend(self, payload, start, shape, query, scale, softcap, mask=None, owners=None):
        out, lse = super().attend(payload, start, shape, query.half(), scale, softcap, mask)
        return out.to(query.dtype), lse


@dataclass(frozen=True)
class HalfPrecision(Method):
    """Halves a float32 cache."""

    name: ClassVar[str] = "half"
    slot: ClassVar[str] = "codec"
    paper: ClassVar[str] = "-"

    def apply(self, spec, model):
        return spec.fill("codec", (HalfCodec(),) * spec.num_layers, by=self.name)


if __name__ == "__main__":
    model, tokenizer = smollm2.load()
    patch_model(model, HalfPrecision())
    inputs = tokenizer("The capital of France is Paris. The capital of Germany is" * 8, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    print(tokenizer.decode(out.logits[0, -1].argmax()), f"{report(out.past_key_values).ratio:.2f} times smaller")
