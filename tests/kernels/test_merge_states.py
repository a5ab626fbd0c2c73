"""`merge_states`: parts joined by their log-sum-exp are one softmax over all of them."""

import itertools

import pytest
import torch

from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.merge_states import merge_partials, merge_states
from hf_kvcache.testing import assert_close

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda dtype: str(dtype)[6:]
)


def states(shape=(2, 3, 5), dim=33, dtype=torch.float32, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    accumulate = torch.promote_types(dtype, torch.float32)
    draw = lambda *sizes: torch.randn(*sizes, generator=generator, dtype=torch.float64)  # noqa: E731
    outs = (draw(*shape, dim).to(dtype) for _ in range(2))
    lses = ((spread * draw(*shape)).to(accumulate) for _ in range(2))
    return [tensor for pair in zip(outs, lses, strict=True) for tensor in pair]


def oracle(out_a, lse_a, out_b, lse_b):
    """The formula in float64, as a softmax over the two parts."""
    lses = torch.stack([lse_a.double(), lse_b.double()])
    weights = lses.softmax(0).nan_to_num(0.0).unsqueeze(-1)
    return (weights * torch.stack([out_a.double(), out_b.double()])).sum(0), lses.logsumexp(0)


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 5), (1, 1, 1), (3, 2, 63)], ids=str)
@pytest.mark.parametrize("spread", [0.1, 3.0, 50.0])
def test_formula(dtype, shape, spread):
    parts = states(shape, dtype=dtype, spread=spread)
    out, lse = merge_states(*parts)
    exact_out, exact_lse = oracle(*parts)
    accumulate = parts[1].dtype
    assert out.dtype == dtype and lse.dtype == accumulate
    # an honest computation in the precision of the sums, rounded once
    weight = torch.softmax(torch.stack([parts[1], parts[3]]), 0).unsqueeze(-1)
    plain = (weight[0] * parts[0].to(accumulate) + weight[1] * parts[2].to(accumulate)).to(dtype)
    assert_close("out", out, exact_out, plain)
    assert_close("lse", lse, exact_lse, torch.logaddexp(parts[1], parts[3]))


@DTYPES
@pytest.mark.parametrize("cuts", [(1, 62), (31, 32), (20, 1, 42), (9,) * 7], ids=str)
def test_merged_blocks_are_one_softmax(dtype, cuts):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 2, 3, 40, generator=generator).to(dtype)
    key, value = (torch.randn(2, 2, 63, 40, generator=generator).to(dtype) for _ in range(2))
    one_out, one_lse = decode_attention(query, key, value, scale=0.2)
    exact_out, exact_lse = decode_attention(query.double(), key.double(), value.double(), scale=0.2)
    blocks = zip(key.split(cuts, dim=2), value.split(cuts, dim=2), strict=True)
    parts = [decode_attention(query, k.contiguous(), v.contiguous(), scale=0.2) for k, v in blocks]
    for order in itertools.islice(itertools.permutations(parts), 4):
        out, lse = order[0]
        for part in order[1:]:
            out, lse = merge_states(out, lse, *part)
        # every merge rounds once more
        assert_close("out", out, exact_out, one_out, factor=2.0 + len(cuts))
        assert_close("lse", lse, exact_lse, one_lse, factor=2.0 + len(cuts))


@DTYPES
def test_a_part_without_keys_changes_nothing(dtype):
    out_a, lse_a, _, _ = states(dtype=dtype)
    empty = torch.zeros_like(out_a), torch.full_like(lse_a, -torch.inf)
    for merged in (merge_states(out_a, lse_a, *empty), merge_states(*empty, out_a, lse_a)):
        assert torch.equal(merged[0], out_a)
        assert torch.equal(merged[1], lse_a)


@DTYPES
def test_two_parts_without_keys_are_a_part_without_keys(dtype):
    out_a, lse_a, _, _ = states(dtype=dtype)
    empty = torch.zeros_like(out_a), torch.full_like(lse_a, -torch.inf)
    out, lse = merge_states(*empty, *empty)
    assert not out.any() and torch.equal(lse, empty[1])


def test_some_rows_without_keys():
    out_a, lse_a, out_b, lse_b = states(shape=(4,))
    lse_a[:2], lse_b[1:3] = -torch.inf, -torch.inf
    out_a[:2], out_b[1:3] = 0, 0
    out, lse = merge_states(out_a, lse_a, out_b, lse_b)
    exact_out, exact_lse = oracle(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out.double(), exact_out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-6)


def test_the_larger_part_wins_without_overflow():
    out_a, lse_a, out_b, lse_b = states()
    out, lse = merge_states(out_a, lse_a + 1e30, out_b, lse_b - 1e30)
    assert torch.equal(out, out_a) and torch.isfinite(lse).all()


def test_the_order_of_two_parts_does_not_matter():
    out_a, lse_a, out_b, lse_b = states()
    one, other = merge_states(out_a, lse_a, out_b, lse_b), merge_states(out_b, lse_b, out_a, lse_a)
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(one[1], other[1])


def test_inputs_are_left_alone():
    parts = states()
    copies = [tensor.clone() for tensor in parts]
    merge_states(*parts)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(parts, copies, strict=True))


@DTYPES
def test_operator_is_registered_as_torch_wants_it(dtype):
    torch.library.opcheck(torch.ops.hf_kvcache.merge_states.default, tuple(states(dtype=dtype)))


@pytest.mark.parametrize("transposed", [(0,), (2,), (0, 1, 2, 3)], ids=str)
def test_the_result_has_its_own_order(transposed):
    """Whatever that of the parts is: a compiled graph takes the strides from the fake operator."""
    parts = states((2, 3, 5))
    for index in transposed:
        parts[index] = parts[index].transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(torch.ops.hf_kvcache.merge_states.default, tuple(parts), test_utils=("test_faketensor",))
    assert all(tensor.is_contiguous() for tensor in merge_states(*parts))


def test_full_graph_compile():
    parts = states()
    compiled = torch.compile(merge_states, fullgraph=True, backend="eager")
    for actual, expected in zip(compiled(*parts), merge_states(*parts), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("which", range(4), ids=["out_a", "lse_a", "out_b", "lse_b"])
def test_gradient_is_refused(which):
    parts = states()
    parts[which].requires_grad_(True)
    out, _ = merge_states(*parts)
    with pytest.raises(RuntimeError, match="merge_states has no gradient"):
        out.sum().backward()


@DTYPES
def test_partial_results_of_several_owners(dtype):
    owner = torch.tensor([3, 0, 0, 4, 3, 0, 4])
    out, lse, *_ = states((7, 5), dtype=dtype, spread=30.0)
    lse[1], lse[3], lse[4, 2] = -torch.inf, -torch.inf, -torch.inf
    lse[6] = -torch.inf
    merged, total = merge_partials(out, lse, owner, 5)
    assert merged.dtype == dtype and torch.isfinite(merged).all()
    for run in range(5):
        lses = lse[owner == run].double()
        weights = lses.softmax(0).nan_to_num(0.0) if len(lses) else lses
        exact = (weights.unsqueeze(-1) * out[owner == run].double()).sum(0)
        torch.testing.assert_close(merged[run].double(), exact, rtol=1e-2, atol=1e-2 if dtype.itemsize == 2 else 1e-6)
        torch.testing.assert_close(total[run].double(), lses.logsumexp(0), rtol=1e-6, atol=1e-6)
