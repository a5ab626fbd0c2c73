"""The bytes that `examples/benchmarks/roofline.py` computes are those that the kernels load and store.

Counted in the interpreter: every element that a load or a store is not masked from. What a program reads again and a
cache holds (rotations, weights, queries of a window) is not memory traffic and is left out of both.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hf_kvcache.codecs.codebooks import cubic
from hf_kvcache.codecs.rotation import rotation
from hf_kvcache.kernels.code_attention import code_attention, pack
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.encode_entries import encode_entries
from hf_kvcache.kernels.gated_retention import gated_retention
from hf_kvcache.kernels.merge_states import merge_states
from hf_kvcache.kernels.select import select
from hf_kvcache.kernels.value_norm import value_norm
from hf_kvcache.kernels.window_scores import window_scores

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import roofline

    yield roofline
    for name in ("roofline", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def counted(monkeypatch):
    """Counts bytes, by the tensor that they are of: `counted(tensor)`, or of everything."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setenv("HF_KVCACHE_BACKEND", "triton")
    seen = []

    def note(pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        kept = pointers.data if mask is None else pointers.data[mask.data.astype(bool)]
        seen.append((kept.ravel(), size))

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self, pointers, mask, *rest):
        note(pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        note(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", masked_store)

    def total(without=()):
        number = 0
        for addresses, size in seen:
            keep = torch.ones(len(addresses), dtype=torch.bool)
            where = torch.from_numpy(addresses.astype("int64"))
            for tensor in without:
                first = tensor.untyped_storage().data_ptr()
                keep &= (where < first) | (where >= first + tensor.untyped_storage().nbytes())
            number += int(keep.sum()) * size
        return number

    return total


def coded(entries, dim, bits):
    codes = torch.randint(0, 2**bits, (entries, dim), dtype=torch.uint8)
    return pack(codes, bits), torch.rand(entries).half(), cubic(dim, bits)


@pytest.mark.parametrize("bits", [(4, 4), (3, 2)], ids=str)
@pytest.mark.parametrize("tokens,stretches", [(128, 2), (1000, 6)])
def test_codes(roofline, counted, bits, tokens, stretches):
    """One load of a code for all query heads of its group."""
    key, value = coded(2 * tokens, 64, bits[0]), coded(2 * tokens, 64, bits[1])
    code_attention(torch.randn(1, 2, 5, 64), key, value, torch.randn(1, 2, 5), scale=0.1)
    expected = roofline.code_attention(2 * tokens, 64, bits, 2, 5, stretches)
    assert counted() == pytest.approx(expected.moved, rel=0.01)
    assert expected.least <= expected.moved


@pytest.mark.parametrize("tokens,stretches", [(128, 2), (1000, 6)])
def test_dense(roofline, counted, tokens, stretches):
    query, key, value = (torch.randn(1, 2, n, 64).half() for n in (5, tokens, tokens))
    decode_attention(query, key, value, scale=0.1)
    assert counted() == pytest.approx(roofline.decode_attention(2 * tokens, 64, 2, 2, 5, stretches).moved, rel=0.01)


def test_merge_states(roofline, counted):
    a, b, lse = torch.randn(30, 64).half(), torch.randn(30, 64).half(), torch.randn(30)
    merge_states(a, lse, b, lse)
    assert counted() == roofline.merge_states(30, 64, 2).moved


@pytest.mark.parametrize("gather", [False, True])
def test_encoding(roofline, counted, gather):
    x, mean, turned = (
        torch.randn(1, 2, 50, 64).half(),
        torch.randn(2, 64),
        rotation("dense", 64, 0, torch.device("cpu")),
    )
    index = torch.randperm(100)[:70] if gather else None
    owners = torch.zeros(70 if gather else 100, dtype=torch.long)
    encode_entries(x, x.clone(), index, owners, mean, turned, (cubic(64, 4), cubic(64, 3)), ((1.0,), (1.0,)))
    from hf_kvcache.kernels.triton_ops import encode_entries as ours

    turns = [ours._split(ours._columns_by_slots(turned, bits), torch.float16, 64**-0.5)[:2] for bits in (4, 3)]
    expected = roofline.encode_entries(len(owners), 64, (4, 3), 2, gather, owned=True)
    # every tile of keys reads the rotated mean of its owner, which the cache has, as it has the rotation
    means = -(-len(owners) // 64) * 64 * 4
    assert counted([part for turn in turns for part in turn]) - means == expected.moved


def test_select(roofline, counted):
    select(torch.randn(3, 2500), torch.tensor([1, 5, 2000]))
    assert counted() == pytest.approx(roofline.select(3, 2500).moved, rel=0.005)


def test_select_in_splits(roofline, counted, monkeypatch):
    from hf_kvcache.kernels.triton_ops import select as launcher

    for name, number in (("SHORT", 0), ("TILE", 512), ("programs_of", lambda device: 100)):
        monkeypatch.setattr(launcher, name, number)
    select(torch.randn(3, 2500), torch.tensor([1, 5, 2000]))
    assert counted() == pytest.approx(roofline.select(3, 2500, splits=5).moved, rel=0.005)


@pytest.mark.parametrize("tokens,group,window,stretches", [(130, 2, 64, 3), (600, 3, 20, 4)])
def test_window_scores(roofline, counted, tokens, group, window, stretches):
    """The keys go by twice, whatever the number of query heads."""
    query, key = torch.randn(1, 2, group, window, 64).half(), torch.randn(1, 2, tokens, 64).half()
    window_scores(query, key, scale=0.1)
    expected = roofline.window_scores(2, tokens, 64, 2, group, window, stretches)
    rows = 32 * 4 if group == 3 else group * window
    # a group of three has the rows of four in the partial results
    padding = 2 * (rows - group * max(16, 1 << (window - 1).bit_length())) * stretches * (1 + stretches) * 4
    assert counted([query]) == expected.moved + padding - 2 * group * window * 64 * 2


@pytest.mark.parametrize("gram,group,parts", [(True, 4, 1), (True, 5, 2), (False, 2, 1)])
def test_value_norm(roofline, counted, gram, group, parts):
    """The values go by once for each part of a group, and weights not more than that."""
    value, weight = torch.randn(1, 2, 150, 64).half(), torch.randn(2, group, 64, 64 if gram else 200)
    value_norm(value, weight @ weight.mT if gram else weight, gram)
    taken = roofline.value_norm(2, 150, 64, 2, 2, group, weight.shape[3], parts)
    # the second program of the same values has them from the cache; PyTorch sums up the parts
    values = 2 * 150 * (64 * 2 * parts + 4 * parts)
    programs = 2 if gram else 1
    if gram:
        assert counted() == values + programs * weight.numel() * 4 * 3 // 4
    else:
        assert counted() == values + programs * weight.numel() * 2
    assert taken.moved >= taken.least


@pytest.mark.parametrize("tokens,parts", [(60, 1), (200, 3)])
def test_retention(roofline, counted, tokens, parts):
    query, key, value = (torch.randn(1, 1, tokens, 64) for _ in range(3))
    gated_retention(query, key, value, -torch.rand(1, 1, tokens), torch.randn(1, 1, 64, 64))
    expected = roofline.gated_retention(1, tokens, 64, 64, 4, columns=32, chunk=32, parts=parts)
    assert counted() == pytest.approx(expected.moved, rel=0.001)


def test_retention_reads_query_and_key_once(roofline, counted):
    """In the configuration that the table is of: all columns of a state in one program."""
    from hf_kvcache.kernels.triton_ops import gated_retention as kernels

    made = kernels.configuration(128, 128, torch.bfloat16, wide=True)
    query, key, value = (torch.randn(1, 2, 300, 128).bfloat16() for _ in range(3))
    gated_retention(query, key, value, -torch.rand(1, 2, 300), torch.randn(1, 2, 128, 128))
    expected = roofline.gated_retention(2, 300, 128, 128, 2, made["COLUMNS"], made["N"], parts=2)
    assert made["COLUMNS"] == 128 and counted() == pytest.approx(expected.moved, rel=0.001)
