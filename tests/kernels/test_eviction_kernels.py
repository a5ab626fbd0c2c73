"""`window_scores`, `value_norm` and `select`: PyTorch and Triton (by its interpreter) against plain formulas."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from hf_kvcache.kernels.select import select
from hf_kvcache.kernels.value_norm import value_norm
from hf_kvcache.kernels.window_scores import window_scores

TRITON = pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"))


@pytest.fixture(params=["reference", TRITON], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("HF_KVCACHE_BACKEND", request.param)
    return request.param


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "tokens,window,group,dim",
    [(100, 7, 3, 32), (65, 65, 1, 80), (9, 1, 2, 64), (1, 1, 1, 16), (270, 260, 1, 16), (140, 60, 5, 32)],
)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_window_scores(dtype, tokens, window, group, dim, softcap):
    query, key = draw(2, 2, group, window, dim, dtype=dtype), draw(2, 2, tokens, dim, seed=1, dtype=dtype)
    scores = torch.einsum("bhgwd,bhtd->bhgwt", query.double(), key.double()) * 0.2
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    for w in range(window):
        scores[..., w, tokens - window + w + 1 :] = -torch.inf
    expected = scores.softmax(-1).mean(3)
    actual = window_scores(query, key, scale=0.2, softcap=softcap)
    assert actual.dtype == torch.float32
    # products of 16-bit numbers are exact in float32
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(actual.sum(-1), torch.ones(2, 2, group), rtol=1e-5, atol=0)


def test_window_scores_of_views():
    query, key = draw(1, 3, 2, 2, 32).transpose(1, 2), draw(1, 2, 90, 32, seed=1)[:, :, :70]
    expected = window_scores(query.contiguous(), key.contiguous(), scale=0.2)
    assert torch.equal(window_scores(query, key, scale=0.2), expected)


@pytest.mark.parametrize("dtype,error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize(
    "tokens,group,dim,width", [(70, 3, 32, 100), (1, 1, 80, 64), (64, 2, 64, 33), (130, 5, 40, 150)]
)
@pytest.mark.parametrize("gram", [False, True])
def test_value_norm(dtype, error, tokens, group, dim, width, gram):
    value, weight = draw(2, 2, tokens, dim, dtype=dtype), draw(2, group, dim, width, seed=1)
    image = torch.einsum("bhtd,hgdw->bhgtw", value.double(), weight.double())
    expected = (image.norm(dim=-1) if gram else image.abs().sum(-1)).mean(2)
    actual = value_norm(value, weight @ weight.mT if gram else weight, gram)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_weights_whose_gram_matrix_float16_does_not_hold(dtype):
    """One head with small ones, one with large ones, and one without any."""
    spread = torch.tensor([6e-6, 6.0, 0.0])
    value = draw(2, 3, 70, 64, dtype=dtype)
    weight = draw(3, 2, 64, 4096, seed=1) * spread[:, None, None, None]
    exact = torch.einsum("bhtd,hgdw->bhgtw", value.double(), weight.double()).norm(dim=-1).mean(2)
    actual = value_norm(value, weight @ weight.mT, gram=True)
    error = {torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(actual.double(), exact, rtol=error, atol=0)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("dim,dtype", [(64, torch.float32), (128, torch.bfloat16)], ids=str)
def test_gram_matrices_that_shared_memory_does_not_hold(monkeypatch, dim, dtype):
    """PyTorch computes the L2 norm of wider heads on a GPU of which a program has 99 KB."""
    launcher = import_module("hf_kvcache.kernels.triton_ops.value_norm")
    for size, known in ((99, False), (163, True)):
        monkeypatch.setattr(launcher, "shared_memory", lambda device, size=size: size * 1024)
        for more, gram in ((0, True), (1, True), (1, False)):
            value = draw(1, 1, 3, dim + more, dtype=dtype)
            found = launcher.value_norm(value, draw(1, 1, dim + more, dim + more), gram)
            assert (found is not NotImplemented) == (known or not more or not gram)


@pytest.fixture
def in_splits(backend, monkeypatch):
    """Rows of more than 128 scores are cut, as they are on a GPU from 16384 on."""
    if backend == "triton":
        launcher = import_module("hf_kvcache.kernels.triton_ops.select")
        for name, number in (("SHORT", 0), ("TILE", 128), ("programs_of", lambda device: 144)):
            monkeypatch.setattr(launcher, name, number)


@pytest.mark.parametrize("tokens", [1, 100, 2500])
@pytest.mark.parametrize("kind", ["distinct", "few", "infinite", "negative"])
def test_select(tokens, kind):
    check_selection(tokens, kind)


@pytest.mark.parametrize("tokens,kind", [(200, "distinct"), (200, "few"), (200, "infinite"), (1, "negative")])
def test_select_in_splits(in_splits, tokens, kind):
    check_selection(tokens, kind)


def check_selection(tokens: int, kind: str) -> None:
    score = draw(2, 3, tokens)
    if kind == "few":
        score = score.round()
    elif kind == "infinite":
        score[..., ::3], score[..., 1::3] = torch.inf, -torch.inf
    elif kind == "negative":
        score = -score.abs() - 1e-30
    counts = torch.tensor([[0, 1, tokens], [tokens // 2, tokens // 3, max(tokens - 1, 0)]])
    mask = select(score, counts)
    assert mask.dtype == torch.bool and torch.equal(mask.sum(-1), counts)
    for row, taken in zip(score.flatten(0, 1), mask.flatten(0, 1)):
        if taken.any() and not taken.all():
            assert row[taken].min() >= row[~taken].max()


def test_the_first_of_equal_scores_are_taken():
    mask = select(torch.tensor([[1.0, 0.0, -0.0, 0.0, 2.0]]), torch.tensor([3]))
    assert mask.tolist() == [[True, True, False, False, True]]


@pytest.mark.parametrize("more", [0, 200, 500])
def test_the_first_of_equal_scores_are_taken_across_splits(in_splits, more):
    score = torch.zeros(2, 500)
    score[0, 499], score[1, ::2] = 1.0, -0.0
    mask = select(score, torch.tensor([more, 500 - more]))
    expected = torch.arange(500) < torch.tensor([[more - 1], [500 - more]])
    expected[0, 499] = more > 0
    assert torch.equal(mask, expected)


def test_values_that_the_gram_matrix_nearly_cancels():
    """A negative square is none: rounded, v M v^T of a small v W may fall below 0."""
    weight = torch.full((1, 1, 32, 8), 1.0)
    value = torch.tensor([1.0, -1.0]).repeat(16).expand(1, 1, 20, 32) + 1e-4 * draw(1, 1, 20, 32)
    actual = value_norm(value, weight @ weight.mT, gram=True)
    exact = torch.einsum("bhtd,hgdw->bhgtw", value.double(), weight.double()).norm(dim=-1)[:, :, 0]
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "op,arguments",
    [
        ("window_scores", (draw(1, 2, 2, 3, 16), draw(1, 2, 20, 16), 0.2, 0.0)),
        ("value_norm", (draw(1, 2, 20, 16), draw(2, 2, 16, 8), False)),
        ("select", (draw(2, 20), torch.tensor([3, 5]))),
    ],
)
def test_operators_are_registered_as_torch_wants_it(op, arguments):
    torch.library.opcheck(
        getattr(torch.ops.hf_kvcache, op).default, arguments, test_utils=("test_schema", "test_faketensor")
    )
