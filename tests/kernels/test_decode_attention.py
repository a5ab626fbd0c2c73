"""`decode_attention` against a float64 oracle: odd sizes, groups, head dimensions, masks, soft caps, dtypes."""

import pytest
import torch
from torch import Tensor

from hf_kvcache.kernels import decode_attention as module
from hf_kvcache.kernels.decode_attention import decode_attention, decode_attention_reference
from hf_kvcache.testing import assert_close

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda dtype: str(dtype)[6:]
)


def oracle(query, key, value, mask, scale, softcap=0.0):
    """The formula in float64, with a plain softmax and -inf."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    scores = query @ key.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def eager(query, key, value, mask, scale, softcap=0.0):
    """The formula as models write it, in the precision of the inputs with the softmax in float32."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.mT).to(accumulate) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(query.dtype) @ value, scores.logsumexp(-1)


def inputs(batch=2, heads=2, queries=3, tokens=63, dim=64, dtype=torch.float32, seed=0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries, dim), (batch, heads, tokens, dim), (batch, heads, tokens, dim))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def random_mask(kind: str, shape: tuple[int, ...], dtype=torch.float32) -> Tensor | None:
    """Every row sees its first token, so that the oracle has no empty row."""
    if kind == "no mask":
        return None
    generator = torch.Generator().manual_seed(7)
    seen = torch.rand(shape, generator=generator) < 0.6
    seen[..., 0] = True
    if kind == "boolean":
        return seen
    bias = torch.randn(shape, generator=generator)
    return bias.to(dtype).masked_fill(~seen, torch.finfo(dtype).min)


def check(query, key, value, mask=None, scale=None, softcap=0.0):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = decode_attention(query, key, value, mask, scale=scale, softcap=softcap)
    exact_out, exact_lse = oracle(query, key, value, mask, scale, softcap)
    plain_out, plain_lse = eager(query, key, value, mask, scale, softcap)
    reference_out, reference_lse = decode_attention_reference(query, key, value, mask, scale, softcap)
    accumulate = torch.promote_types(query.dtype, torch.float32)
    assert out.dtype == reference_out.dtype == query.dtype
    assert lse.dtype == reference_lse.dtype == accumulate
    assert_close("out", out, exact_out, plain_out)
    assert_close("lse", lse, exact_lse, plain_lse)
    assert_close("out of the reference", reference_out, exact_out, plain_out)
    assert_close("lse of the reference", reference_lse, exact_lse, plain_lse)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 63, 100, 129, 500])
def test_numbers_of_tokens(dtype, tokens):
    check(*inputs(tokens=tokens, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("dim", [8, 32, 64, 80, 128])
def test_head_dimensions(dtype, dim):
    check(*inputs(dim=dim, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 5])
def test_groups_folded_into_rows(dtype, group, length):
    """The folded call is plain attention of `group` times as many query heads, with the keys repeated."""
    query, key, value = inputs(queries=group * length, dtype=dtype)
    check(query, key, value)
    heads = query.view(2, 2 * group, length, 64)
    repeated = torch.nn.functional.scaled_dot_product_attention(
        heads.double(), *(tensor.double().repeat_interleave(group, dim=1) for tensor in (key, value))
    )
    exact, _ = oracle(query, key, value, None, 64**-0.5)
    torch.testing.assert_close(exact.view(2, 2 * group, length, 64), repeated)


@DTYPES
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("shape", [(2, 2, 3, 63), (2, 1, 3, 63), (1, 1, 1, 63)], ids=str)
def test_masks(dtype, kind, shape):
    check(*inputs(dtype=dtype), mask=random_mask(kind, shape, dtype))


@DTYPES
@pytest.mark.parametrize("kind", ["no mask", "boolean", "additive"])
@pytest.mark.parametrize("softcap", [1.0, 20.0])
def test_soft_caps(dtype, kind, softcap):
    check(*inputs(dtype=dtype), mask=random_mask(kind, (2, 1, 3, 63), dtype), softcap=softcap)


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_scales(scale):
    check(*inputs(), scale=scale)


@pytest.mark.parametrize("kind", ["no mask", "boolean"])
@pytest.mark.parametrize("low", ["q", "k", "v", "qk", "kv", "qv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_each_tensor_may_have_its_own_dtype(dtype, low, kind):
    """Under autocast RoPE makes float32 of queries and keys, and values stay as their projection made them."""
    given = dict(zip("qkv", inputs(), strict=True))
    query, key, value = (tensor.to(dtype if name in low else tensor.dtype) for name, tensor in given.items())
    mask = random_mask(kind, (2, 1, 3, 63))
    out, lse = decode_attention(query, key, value, mask, scale=0.125)
    assert out.dtype == query.dtype and lse.dtype == torch.float32
    exact_out, exact_lse = oracle(query, key, value, mask, 0.125)
    # weights are rounded to the dtype of the values, the result to that of the query
    plain, _ = eager(*(tensor.float() for tensor in (query, key, value)), mask, 0.125)
    assert_close("out", out, exact_out, plain.to(dtype if set(low) & set("qv") else query.dtype))
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.hf_kvcache.decode_attention.default, (query, key, value, mask, 0.125, 0.0))


def test_value_may_be_narrower_than_key():
    query, key, value = inputs()
    out, lse = decode_attention(query, key, value[..., :40].contiguous(), scale=0.1)
    exact, exact_lse = oracle(query, key, value[..., :40], None, 0.1)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_inputs_may_be_views(seed):
    """A tail gives the front of a longer buffer, a projection a transposed one."""
    query, key, value = inputs(tokens=100, seed=seed)
    key, value = key[:, :, :61], value[:, :, :61]
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(tensor.is_contiguous() for tensor in (query, key, value))
    check(query, key, value)


@DTYPES
def test_a_row_that_sees_nothing_is_finite(dtype):
    """It belongs to padding; a NaN there would spread to the keys of the next layer."""
    query, key, value = inputs(dtype=dtype)
    mask = torch.ones(2, 1, 3, 63, dtype=torch.bool)
    mask[0, :, 1] = False
    out, lse = decode_attention(query, key, value, mask, scale=0.125)
    assert torch.isfinite(out).all() and not torch.isnan(lse).any()
    exact, _ = oracle(query, key, value, None, 0.125)
    plain, _ = eager(query, key, value, None, 0.125)
    sees = torch.tensor([True, False, True])
    assert_close("rows that see", out[:, :, sees], exact[:, :, sees], plain[:, :, sees])


@DTYPES
def test_large_scores_do_not_overflow(dtype):
    query, key, value = inputs(dtype=dtype)
    out, lse = decode_attention(query * 30, key * 30, value, scale=1.0)
    _, exact_lse = oracle(query * 30, key * 30, value, None, 1.0)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", ["no mask", "boolean", "additive"])
def test_the_fused_cpu_path_is_the_reference(dtype, kind):
    query, key, value = inputs(dtype=dtype, tokens=100)
    mask = random_mask(kind, (2, 1, 3, 100), dtype)
    exact = oracle(query, key, value, mask, 0.125)
    fused = torch.ops.hf_kvcache.decode_attention(query, key, value, mask, 0.125, 0.0)
    # the fused kernel is asked for no more than what models compute, which round their scores to the inputs' dtype
    plain = eager(query, key, value, mask, 0.125)
    reference = decode_attention_reference(query, key, value, mask, 0.125, 0.0)
    for name, actual, true, honest, own in zip(("out", "lse"), fused, exact, plain, reference, strict=True):
        assert_close(name, actual, true, honest)
        rounding = float(torch.finfo(dtype).eps) * float(exact[1].abs().max())
        torch.testing.assert_close(actual, own, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("kind", ["no mask", "boolean", "additive"])
@pytest.mark.parametrize("softcap", [0.0, 10.0])
def test_operator_is_registered_as_torch_wants_it(kind, softcap):
    query, key, value = inputs(tokens=13)
    mask = random_mask(kind, (2, 1, 3, 13))
    op = torch.ops.hf_kvcache.decode_attention.default
    torch.library.opcheck(op, (query, key, value, mask, 0.125, softcap))
    torch.library.opcheck(op, (query.double(), key.double(), value.double(), None, 0.125, softcap))
    torch.library.opcheck(op, (query.bfloat16(), key.bfloat16(), value.bfloat16(), None, 0.125, softcap))


def test_operator_with_a_narrower_value_as_torch_wants_it():
    query, key, value = inputs(tokens=13)
    op = torch.ops.hf_kvcache.decode_attention.default
    torch.library.opcheck(op, (query, key, value[..., :40].contiguous(), None, 0.125, 0.0))


def test_full_graph_compile():
    query, key, value = inputs()
    compiled = torch.compile(
        lambda q, k, v: decode_attention(q, k, v, scale=0.125, softcap=4.0), fullgraph=True, backend="eager"
    )
    expected = decode_attention(query, key, value, scale=0.125, softcap=4.0)
    for actual, tensor in zip(compiled(query, key, value), expected, strict=True):
        assert torch.equal(actual, tensor)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_gradient_is_refused(which):
    tensors = inputs()
    tensors[which].requires_grad_(True)
    out, _ = decode_attention(*tensors, scale=0.125)
    with pytest.raises(RuntimeError, match="decode_attention has no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("numbers", [1 << 24, 2000])
@pytest.mark.parametrize("dtype,size", [(torch.bfloat16, 4), (torch.float16, 4), (torch.float16, 100)], ids=str)
def test_scores_of_16_bit_inputs_are_in_float32(monkeypatch, dtype, size, numbers):
    """A product rounded to bfloat16 is off by a part in 256 of scores that exponentiate; in float16 it overflows."""
    monkeypatch.setattr(module, "NUMBERS", numbers)
    query, key, value = inputs(tokens=101, dtype=dtype)
    query, key = query * size, key * size
    scale = 1 / size**2
    out, lse = decode_attention_reference(query, key, value, None, scale, 0.0)
    exact_out, exact_lse = oracle(query, key, value, None, scale)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    # its weights and its result are rounded to the dtype of the values
    assert_close("out", out, exact_out, eager(query.float(), key.float(), value.float(), None, scale)[0].to(dtype))
