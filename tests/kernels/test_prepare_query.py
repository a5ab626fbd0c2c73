"""`prepare_query`: rotation and products with means against float64, in PyTorch and in Triton's interpreter."""

from importlib.util import find_spec

import pytest
import torch

from hf_kvcache.codecs.rotation import rotation
from hf_kvcache.kernels.prepare_query import prepare_query

REFERENCES = ("hf_kvcache.kernels.prepare_query.prepare_query_reference",)


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(
    params=[
        "pytorch",
        pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")),
    ]
)
def backend(request):
    """Who computes."""
    if request.param == "triton":
        for fixture in ("interpreted", "no_reference"):
            request.getfixturevalue(fixture)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 1, 64), (1, 2, 37, 24), (1, 1, 5, 256)], ids=str)
@pytest.mark.parametrize("means", ["none", "one", "few", "every", "whose"])
def test_agrees_with_float64(backend, dtype, shape, means):
    rows, heads, _, dim = shape
    query, turn = draw(*shape, dtype=dtype), rotation("hadamard", dim, 0, torch.device("cpu"))
    runs = rows * heads
    count = {"none": 0, "one": 1, "few": max(runs - 1, 1)}.get(means, runs)
    mean = draw(count, dim, seed=1, dtype=dtype) if count else None
    owners = torch.arange(runs).flip(0).view(rows, heads) if means == "whose" else None
    # a view, as a projection gives it
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    turned, shift = prepare_query(query, turn, mean, owners)
    assert turned.dtype == torch.float32
    torch.testing.assert_close(turned.double(), query.double() @ turn.double(), rtol=1e-5, atol=1e-5)
    if mean is None:
        assert shift is None
        return
    whose = torch.arange(runs).view(rows, heads) if owners is None else owners
    exact = torch.einsum("rhmd,rhd->rhm", query.double(), mean.double()[whose.clamp(max=count - 1)])
    assert shift.dtype == torch.float32
    torch.testing.assert_close(shift.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("means", [True, False])
def test_operator_is_registered_as_torch_wants_it(means):
    arguments = (draw(2, 3, 4, 16), draw(16, 16, seed=1), draw(6, 16, seed=2) if means else None, None)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.hf_kvcache.prepare_query.default, arguments, test_utils=tests)


def test_the_result_has_its_own_order(backend):
    """Whatever that of the query is: a compiled graph takes the strides from the fake operator."""
    query = draw(2, 4, 3, 16).transpose(1, 2)
    torch.library.opcheck(
        torch.ops.hf_kvcache.prepare_query.default, (query, draw(16, 16, seed=1), draw(6, 16, seed=2), None),
        test_utils=("test_faketensor",),
    )  # fmt: skip
    assert prepare_query(query, draw(16, 16, seed=1), None)[0].is_contiguous()


def test_gradient_is_refused():
    turned, _ = prepare_query(draw(1, 1, 2, 16).requires_grad_(True), draw(16, 16, seed=1), None)
    with pytest.raises(RuntimeError, match="prepare_query has no gradient"):
        turned.sum().backward()
