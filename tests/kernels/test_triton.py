"""The Triton kernels, run by Triton's interpreter, against float64: odd sizes, ragged lengths, poisoned memory.

Tolerances follow from what the kernels round: the query and the weights to float16 (codes) or to the dtype of the
inputs (dense), everything else is float32.
"""

import mmap

import pytest
import torch

from hf_kvcache.codecs.codebooks import cubic
from hf_kvcache.kernels.code_attention import code_attention, levels_of, pack
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.merge_states import merge_states
from hf_kvcache.kernels.ragged_attention import ragged_code_attention, ragged_decode_attention, work_list
from hf_kvcache.testing import assert_close

triton = pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.usefixtures("interpreted")
REFERENCES = (
    "hf_kvcache.kernels.code_attention._attend",
    "hf_kvcache.kernels.decode_attention._additive",
    "hf_kvcache.kernels.ragged_attention._by_stretch",
    "torch.logaddexp",
    "torch.logsumexp",
)

HALF = 2.0**-11  # relative rounding of float16

BITS = pytest.mark.parametrize("bits", [4, 3, 2])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(query, key, value, mask=None, bias=0.0, scale=1.0, softcap=0.0):
    """In float64; a row without a key has out 0 and lse -inf."""
    scores = (query.double() @ key.double().mT + bias) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    # as logsumexp, which some of these tests forbid the kernels
    top = (
        scores.amax(-1, keepdim=True).clamp_min(-1e300) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    )
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights @ value.double() / total.clamp_min(1e-300), (total.log() + top).squeeze(-1)


def coded(entries: int, dim: int, bits: int, book: str, seed: int, scale: float = 1.0):
    """(codes, scales, levels) as the operators take them, and what they stand for without the sign of the scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (entries, dim), generator=generator, dtype=torch.uint8)
    levels = cubic(dim, bits) if book == "cubic" else (torch.arange(2.0**bits) - (2**bits - 1) / 2) * 0.37
    scales = (scale * torch.randn(entries, generator=generator)).to(torch.float16)
    packed = pack(codes, bits)
    return (packed, scales, levels), levels_of(packed, levels).double() * scales.double().abs()[:, None]


def signed(coding, plain):
    """Values of negative scale."""
    return plain * coding[1].double().sign()[:, None]


def check(name, actual, exact, error):
    """Relative to the largest number of the result."""
    assert actual.shape == exact.shape
    assert not actual.isnan().any(), f"{name} has NaN"
    far = (actual.double() - exact)[exact.isfinite()].abs().max() if exact.isfinite().any() else torch.tensor(0.0)
    assert torch.equal(actual.isfinite(), exact.isfinite()), f"{name} is finite elsewhere"
    size = exact[exact.isfinite()].abs().max() if exact.isfinite().any() else 1.0
    assert far <= error * size, f"{name}: error {far / size:.1e} of the largest number, allowed are {error:.1e}"


def check_codes(out, lse, query, key, value, scale, exact):
    """Scores carry the rounding of a float16 query, results that of float16 weights and levels."""
    reach = float(query.double().norm(dim=-1).amax() * key.norm(dim=-1).amax() * scale)
    check(
        "lse", lse, exact[1], 2 * HALF * reach / float(exact[1][exact[1].isfinite()].abs().max().clamp_min(1e-3)) + 1e-5
    )
    check("out", out, exact[0], 2 * HALF * reach + 4 * HALF)
    assert (out.double() - exact[0]).norm() <= 2e-3 * exact[0].norm()


@BITS
@pytest.mark.parametrize(
    "book,shape",
    [
        ("uniform", (1, 2, 150, 128, 4)),
        ("cubic", (1, 1, 150, 128, 4)),
        ("cubic", (2, 1, 77, 64, 3)),
        ("cubic", (1, 3, 1, 96, 11)),
        ("uniform", (1, 1, 65, 80, 1)),
    ],
    ids=str,
)
def test_codes(no_reference, bits, book, shape):
    rows, heads, tokens, dim, queries = shape
    key, plain_key = coded(rows * heads * tokens, dim, bits, book, seed=1, scale=0.3)
    value, plain_value = coded(rows * heads * tokens, dim, bits, book, seed=2)
    query, bias = draw(rows, heads, queries, dim, seed=3), draw(rows, heads, queries, seed=4)
    # one of the shapes without a shift, with a soft cap
    shift, softcap = (None, 2.0) if dim == 80 else (bias, 0.0)
    out, lse = code_attention(query, key, value, shift, scale=dim**-0.5, softcap=softcap)
    split = (rows, heads, tokens, dim)
    k, v = plain_key.view(split), signed(value, plain_value).view(split)
    shifted = 0.0 if shift is None else shift.double()[..., None] * (key[1] > 0).view(rows, heads, 1, tokens)
    exact = oracle(query, k, v, None, shifted, dim**-0.5, softcap)
    check_codes(out, lse, query, k, v, dim**-0.5, exact)


@pytest.mark.parametrize("key_bits,value_bits", [(4, 2), (2, 3), (3, 4)])
def test_keys_and_values_of_other_widths(no_reference, key_bits, value_bits):
    key, k = coded(70, 64, key_bits, "cubic", seed=1, scale=0.3)
    value, v = coded(70, 64, value_bits, "uniform", seed=2)
    query = draw(1, 1, 4, 64)
    out, lse = code_attention(query, key, value, scale=0.125)
    exact = oracle(query, k[None, None], signed(value, v)[None, None], scale=0.125)
    check_codes(out, lse, query, k, v, 0.125, exact)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_codes_of_extreme_numbers(no_reference, size):
    """float16 holds neither a tiny scale times a small weight nor a large query."""
    key, k = coded(100, 64, 4, "uniform", seed=1, scale=0.3 / size)
    value, v = coded(100, 64, 4, "uniform", seed=2, scale=1 / size)
    query = draw(1, 1, 4, 64) * size
    key = (key[0], key[1].float() if size > 1 else key[1], key[2])
    out, lse = code_attention(query, key, value, scale=0.125)
    exact = oracle(query, k[None, None], signed(value, v)[None, None], scale=0.125)
    check_codes(out, lse, query, k, v, 0.125, exact)


def ranges(lengths, order_seed=0):
    """Runs cut in two ranges each, which lie in the store in random order, with foreign entries between them."""
    generator = torch.Generator().manual_seed(order_seed)
    pieces = [(run, part) for run, n in enumerate(lengths) for part in (n - n // 3, n // 3)]
    order = torch.randperm(len(pieces), generator=generator).tolist()
    run, first, end, place = [], [], [], 5
    for piece in order:
        run.append(pieces[piece][0])
        first.append(place)
        end.append(place + pieces[piece][1])
        place = end[-1] + 3
    return torch.tensor(run), torch.tensor(first), torch.tensor(end), place


LENGTHS = pytest.mark.parametrize("lengths", [(600, 37, 1, 0), (0, 0, 5, 64)], ids=str)


@LENGTHS
@pytest.mark.parametrize("bits", [4, 3])
def test_ragged_codes(no_reference, lengths, bits):
    run, first, end, entries = ranges(lengths)
    key, k = coded(entries, 64, bits, "cubic", seed=1, scale=0.3)
    value, v = coded(entries, 64, bits, "cubic", seed=2)
    v = signed(value, v)
    query, bias = draw(2, 2, 3, 64, seed=3), draw(2, 2, 3, seed=4)
    work, parts = work_list(run, first, end, 4, programs=6)
    out, lse = ragged_code_attention(query, key, value, work, parts, bias, scale=0.125)
    for r in range(4):
        index = torch.cat([torch.arange(a, b) for s, a, b in zip(run, first, end) if s == r])
        shift = bias[r // 2, r % 2].double()[:, None] * (key[1][index] > 0)
        exact = oracle(query[r // 2, r % 2], k[index], v[index], None, shift, 0.125)
        if len(index):
            check_codes(out[r // 2, r % 2], lse[r // 2, r % 2], query, k, v, 0.125, exact)
        else:
            assert not out[r // 2, r % 2].any() and (lse[r // 2, r % 2] == -torch.inf).all()


@LENGTHS
@DTYPES
def test_ragged_dense(no_reference, lengths, dtype):
    run, first, end, entries = ranges(lengths)
    key, value = draw(entries, 80, seed=1, dtype=dtype), draw(entries, 80, seed=2, dtype=dtype)
    query = draw(2, 2, 3, 80, seed=3, dtype=dtype)
    work, parts = work_list(run, first, end, 4, programs=6)
    out, lse = ragged_decode_attention(query, key, value, work, parts, scale=0.1, softcap=5.0)
    for r in range(4):
        index = torch.cat([torch.arange(a, b) for s, a, b in zip(run, first, end) if s == r])
        exact = oracle(query[r // 2, r % 2], key[index], value[index], scale=0.1, softcap=5.0)
        check("out", out[r // 2, r % 2], exact[0], 4 * torch.finfo(dtype).eps + 1e-5)
        check("lse", lse[r // 2, r % 2], exact[1], 1e-4)


def plain_attention(query, key, value, mask, scale, softcap):
    """An honest computation in the dtype of the inputs with sums in float32."""
    scores = (query.float() @ key.float().mT) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return ((weights.to(value.dtype).float() @ value.float()) / weights.sum(-1, keepdim=True)).to(query.dtype)


@DTYPES
@pytest.mark.parametrize("tokens,dim,queries", [(1, 64, 1), (63, 80, 3), (400, 64, 5), (133, 128, 9), (40, 256, 40)])
@pytest.mark.parametrize("options", ["plain", "softcap", "mask"])
def test_dense(no_reference, dtype, tokens, dim, queries, options):
    query, key, value = (draw(2, 2, n, dim, seed=n, dtype=dtype) for n in (queries, tokens, tokens))
    mask, softcap = None, 3.0 if options == "softcap" else 0.0
    if options == "mask":
        mask = draw(2, 1, queries, tokens, seed=9) > 0
        mask[..., 0] = True
    out, lse = decode_attention(query, key, value, mask, scale=dim**-0.5, softcap=softcap)
    exact = oracle(query, key, value, mask, scale=dim**-0.5, softcap=softcap)
    assert out.dtype == dtype and lse.dtype == torch.float32
    honest = plain_attention(query, key, value, mask, dim**-0.5, softcap)
    # the interpreter truncates where a GPU rounds: twice the rounding of the output
    assert_close("out", out, exact[0], honest, factor=6.0 if dtype == torch.bfloat16 else 3.0)
    check("lse", lse, exact[1], 1e-5)


def test_dense_over_views(no_reference):
    """A tail gives the front of a longer buffer, a projection a transposed one; a value may be narrower."""
    query = draw(2, 3, 2, 64).transpose(1, 2)
    key, value = draw(2, 2, 100, 64, seed=1)[:, :, :61], draw(2, 2, 100, 64, seed=2)[:, :, 3:64, :40]
    assert not any(tensor.is_contiguous() for tensor in (query, key, value))
    out, lse = decode_attention(query, key, value, scale=0.125)
    exact = oracle(query, key, value, scale=0.125)
    check("out", out, exact[0], 1e-5)
    check("lse", lse, exact[1], 1e-5)


def test_a_mask_of_more_than_two_billion_places(no_reference):
    """Its rows lie so far apart that the last one begins behind what 32 bits can count; only they are ever touched."""
    query, key, value = draw(1, 1, 5, 16, seed=1), draw(1, 1, 20, 16, seed=2), draw(1, 1, 20, 16, seed=3)
    mask = draw(1, 1, 5, 20, seed=4) > 0
    mask[..., 0] = True
    apart = torch.empty(2**31 + 20, dtype=torch.bool).as_strided((1, 1, 5, 20), (0, 0, 2**29, 1))
    apart.copy_(mask)
    out, lse = decode_attention(query, key, value, apart, scale=0.25)
    exact = oracle(query, key, value, mask, scale=0.25)
    check("out", out, exact[0], 1e-5)
    check("lse", lse, exact[1], 1e-5)


def test_a_row_that_sees_nothing_is_finite(no_reference):
    query, key, value = draw(1, 1, 3, 64), draw(1, 1, 300, 64, seed=1), draw(1, 1, 300, 64, seed=2)
    mask = torch.ones(1, 1, 3, 300, dtype=torch.bool)
    mask[..., 1, :] = False
    out, lse = decode_attention(query, key, value, mask, scale=0.125)
    assert out.isfinite().all() and lse.isfinite().all() and float(lse[0, 0, 1]) < -1e38
    exact = oracle(query, key, value, scale=0.125)
    check("rows that see", out[:, :, ::2], exact[0][:, :, ::2], 1e-5)


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (2, 3, 5), (3, 2, 63)], ids=str)
@pytest.mark.parametrize("spread", [0.1, 50.0])
def test_merge_states(no_reference, dtype, shape, spread):
    out_a, out_b = draw(*shape, 33, seed=1, dtype=dtype), draw(*shape, 33, seed=2, dtype=dtype)
    lse_a, lse_b = spread * draw(*shape, seed=3), spread * draw(*shape, seed=4)
    lse_a.view(-1)[-1] = -torch.inf
    out, lse = merge_states(out_a, lse_a, out_b, lse_b)
    weight = torch.stack([lse_a, lse_b]).double().softmax(0)[..., None]
    exact = weight[0] * out_a.double() + weight[1] * out_b.double()
    # truncated by the interpreter
    check("out", out, exact, 2 * torch.finfo(dtype).eps)
    check("lse", lse, (lse_a.double().exp() + lse_b.double().exp()).log(), 1e-6)


def test_merging_a_part_in_float32(no_reference):
    out_a, out_b = draw(3, 5, 33, seed=1), draw(3, 5, 33, seed=2, dtype=torch.bfloat16)
    lse_a, lse_b = draw(3, 5, seed=3), draw(3, 5, seed=4)
    out, _ = merge_states(out_a, lse_a, out_b, lse_b)
    assert out.dtype == torch.bfloat16
    weight = torch.stack([lse_a, lse_b]).double().softmax(0)[..., None]
    check("out", out, weight[0] * out_a.double() + weight[1] * out_b.double(), 2 * torch.finfo(torch.bfloat16).eps)


def test_merging_parts_without_keys(no_reference):
    out_a, lse_a = draw(4, 16), torch.full((4,), -torch.inf)
    zero = torch.zeros(4, 16)
    out, lse = merge_states(zero, lse_a, zero, lse_a)
    assert not out.any() and (lse == -torch.inf).all()
    out, lse = merge_states(out_a, torch.zeros(4), zero, lse_a)
    assert torch.equal(out, out_a) and not lse.any()


def test_codes_in_other_places_of_memory(no_reference):
    """Slices that begin at any entry, and a query that is a view."""
    key, k = coded(90, 64, 3, "cubic", seed=1, scale=0.3)
    value, v = coded(90, 64, 3, "cubic", seed=2)
    query = draw(1, 4, 1, 64).transpose(1, 2)
    cut = slice(7, 84)
    parts = ((codes[cut], scales[cut], levels) for codes, scales, levels in (key, value))
    out, lse = code_attention(query, *parts, scale=0.125)
    exact = oracle(query, k[cut], signed(value, v)[cut], scale=0.125)
    check_codes(out, lse, query, k, v, 0.125, exact)


def test_more_than_two_to_the_31_bytes_of_codes(no_reference):
    """Offsets need 64 bits. Memory that nobody writes to is not taken."""
    entries, held = 2**25 + 300, 200
    pool = torch.frombuffer(mmap.mmap(-1, entries * 64), dtype=torch.uint8).view(entries, 64)
    scales = torch.frombuffer(mmap.mmap(-1, entries * 2), dtype=torch.float16)
    assert pool.numel() > 2**31
    (codes, small, levels), k = coded(held, 128, 4, "uniform", seed=1, scale=0.3)
    pool[-held:], scales[-held:] = codes, small
    query = draw(1, 1, 3, 128)
    work, parts = work_list(torch.tensor([0]), torch.tensor([entries - held]), torch.tensor([entries]), 1, 6)
    entry = (pool, scales, levels)
    out, lse = ragged_code_attention(query, entry, entry, work, parts, scale=0.1)
    exact = oracle(query, k[None, None], signed((codes, small), k)[None, None], scale=0.1)
    check_codes(out, lse, query, k, k, 0.1, exact)
