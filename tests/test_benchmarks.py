"""What the benchmarks count: bytes of a float32 run as a model in 16 bits would hold them."""

import importlib
from pathlib import Path

import pytest
import torch

from hf_kvcache.testing import live_bytes, random_ids, tiny_model

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"
TOKENS = 96


@pytest.fixture
def peer_backends(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("peer_backends")


@pytest.mark.parametrize(
    ("backend", "method", "kept"),
    [
        ("ours", "none", None),
        ("ours", "knorm", 0.25),
        ("ours", 'turboquant{"bits": 3}', None),
        ("ours", 'knorm+turboquant{"key_bits": 8, "value_bits": 4}', 0.5),
        ("transformers", "dynamic", None),
    ],
)
def test_bytes_in_16_bits_are_those_of_a_model_in_16_bits(peer_backends, backend, method, kept):
    ids, held = random_ids(length=TOKENS), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama").to(dtype)
        with peer_backends.opened(backend, model, None, method, kept) as opened:
            cache = opened.prefill(ids)
            held[dtype] = live_bytes(cache)
            if dtype == torch.float32:
                told, smaller = peer_backends.bytes_in_16_bit(cache), opened.times_smaller(cache, TOKENS)
    assert told == held[torch.bfloat16] < held[torch.float32]
    full = 2 * 4 * 2 * TOKENS * 8 * 2  # K and V, layers, KV heads, tokens, head dimension, 16 bits
    assert smaller == pytest.approx(full / held[torch.bfloat16])
    assert method not in ("none", "dynamic") or smaller == 1
