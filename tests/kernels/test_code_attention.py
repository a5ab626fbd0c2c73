"""`code_attention`: codes survive packing, and attention over them is attention over what they stand for."""

import pytest
import torch

import hf_kvcache.kernels.code_attention as module
from hf_kvcache.kernels.code_attention import code_attention, levels_of, pack, unpack

BITS = pytest.mark.parametrize("bits", [8, 4, 3, 2])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(entries: int, dim: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (entries, dim), generator=generator, dtype=torch.uint8)


def encoded(entries: int, dim: int, bits: int, seed: int):
    levels = draw(2**bits, seed=seed).sort().values
    scales = draw(entries, seed=seed + 1).to(torch.float16)
    return (pack(codes(entries, dim, bits, seed), bits), scales, levels), levels[codes(entries, dim, bits, seed).int()]


def oracle(query, key, value, bias, mask, scale, softcap):
    """In float64; a row without a key has out 0 and lse -inf."""
    scores = query.double() @ key.double().transpose(-1, -2)
    if bias is not None:
        scores += bias
    scores *= scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ value.double(), scores.logsumexp(-1)


@BITS
@pytest.mark.parametrize("dim", [8, 64, 80, 112])
@pytest.mark.parametrize("entries", [0, 1, 77])
def test_packed_codes_come_back(bits, dim, entries):
    plain = codes(entries, dim, bits)
    packed = pack(plain, bits)
    assert packed.shape == (entries, dim * bits // 8) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), plain)
    levels = draw(2**bits)
    assert torch.equal(levels_of(packed, levels), levels[plain.int()])


@BITS
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(1, 2, 300), (2, 3, 1), (70, 1, 16), (1, 1, 63)], ids=str)
@pytest.mark.parametrize("options", ["plain", "bias", "mask", "both"])
def test_agrees_with_dense_attention(monkeypatch, bits, softcap, shape, options):
    monkeypatch.setattr(module, "ENTRIES", 128)
    monkeypatch.setattr(module, "SCORES", 2000)
    rows, heads, tokens = shape
    entries, dim, length = rows * heads * tokens, 24, 5
    key, dense_key = encoded(entries, dim, bits, seed=1)
    value, dense_value = encoded(entries, dim, bits, seed=4)
    query = draw(rows, heads, length, dim, seed=7)
    bias = draw(rows, heads, length, seed=8) if options in ("bias", "both") else None
    mask = draw(rows, 1, length, tokens, seed=9) > 0 if options in ("mask", "both") else None
    if mask is not None:
        mask[-1, :, 0] = False
    out, lse = code_attention(query, key, value, bias, mask, scale=0.3, softcap=softcap)
    dense_key = (dense_key * key[1].float().abs()[:, None]).view(rows, heads, tokens, dim)
    dense_value = (dense_value * value[1].float()[:, None]).view(rows, heads, tokens, dim)
    shift = None if bias is None else bias[..., None] * (key[1] > 0).view(rows, heads, 1, tokens)
    exact_out, exact_lse = oracle(query, dense_key, dense_value, shift, mask, 0.3, softcap)
    torch.testing.assert_close(out.double(), exact_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_output_has_the_dtype_of_the_query(dtype):
    key, dense_key = encoded(40, 16, 4, seed=1)
    value, dense_value = encoded(40, 16, 4, seed=4)
    query = draw(1, 1, 2, 16).to(dtype)
    out, lse = code_attention(query, key, value, scale=0.2)
    assert out.dtype == dtype and lse.dtype == torch.float32
    dense_key, dense_value = dense_key * key[1].float().abs()[:, None], dense_value * value[1].float()[:, None]
    exact, _ = oracle(query, dense_key, dense_value, None, None, 0.2, 0.0)
    torch.testing.assert_close(out.double(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-3)


@BITS
def test_memory_beyond_the_codes_is_one_block(bits):
    """No dense copy of the segment, at any time."""
    entries, dim = 16 * module.ENTRIES, 64
    key, value = (encoded(entries, dim, bits, seed)[0] for seed in (1, 4))
    query = draw(1, 1, 1, dim)
    profiler = torch.profiler.profile(profile_memory=True)
    with torch.no_grad(), profiler:
        code_attention(query, key, value, scale=0.1)
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert largest <= module.ENTRIES * dim * 4
    assert largest < entries * dim * 4 / 8


def test_operator_is_registered_as_torch_wants_it():
    key, value = (encoded(40, 16, 4, seed)[0] for seed in (1, 4))
    arguments = (draw(2, 1, 3, 16), key[0], key[1], value[0], value[1], key[2], value[2], draw(2, 1, 3), None, 0.2, 0.0)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.hf_kvcache.code_attention.default, arguments, test_utils=tests)


def test_gradient_is_refused():
    key, value = (encoded(40, 16, 4, seed)[0] for seed in (1, 4))
    out, _ = code_attention(draw(1, 1, 2, 16).requires_grad_(True), key, value, scale=0.2)
    with pytest.raises(RuntimeError, match="code_attention has no gradient"):
        out.sum().backward()
