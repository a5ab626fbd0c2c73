"""`encode_entries`: Triton, by its interpreter, against float64 and the PyTorch version: sizes, dtypes, extremes."""

import itertools
from importlib.util import find_spec

import pytest
import torch

from hf_kvcache.codecs import TurboQuantCodec
from hf_kvcache.codecs.codebooks import cubic, lloyd_max
from hf_kvcache.codecs.rotation import rotation
from hf_kvcache.kernels.code_attention import levels_of
from hf_kvcache.kernels.encode_entries import encode_entries, encode_entries_reference
from hf_kvcache.segment import Segment
from hf_kvcache.stores import DeviceStore

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.usefixtures("interpreted"),
]
REFERENCES = ("hf_kvcache.kernels.encode_entries._quantise",)

CPU = torch.device("cpu")
FACTORS = ((0.9, 1.0, 1.1), (0.92, 1.04))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS, SIZES = ((4, 4), (3, 2), (2, 3)), ((64, 37), (96, 33), (128, 5))


def combinations():
    """Every dtype, width and size with every other one; by default as many as see each of them three times."""
    for (a, dtype), (b, bits), (c, size) in itertools.product(*map(enumerate, (DTYPES, WIDTHS, SIZES))):
        yield pytest.param(dtype, bits, *size, marks=[] if (a + b + c) % 3 == 0 else pytest.mark.slow)


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def keys(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Vectors around a common mean, with a large channel and some near the origin, as keys are."""
    made = draw(*shape, seed=seed) + 1.5 * draw(shape[-1], seed=99)
    made[..., 3] *= 8
    made[..., ::7, :] *= 0.1
    return made.to(dtype)


def levels(dim: int, bits: int, kind: str = "cubic") -> torch.Tensor:
    """Those of the codec, or the best equal steps."""
    if kind == "cubic":
        return cubic(dim, bits)
    return (torch.arange(2.0**bits) - (2**bits - 1) / 2) * {4: 0.335, 3: 0.586, 2: 0.996}[bits]


def errors(codes, scale, book, exact):
    """Squared errors of the rows, in float64."""
    return (levels_of(codes, book).double() * scale.double().abs()[:, None] - exact).square().sum(1)


def check(found, x, owners, mean, turned, books):
    """The codes are as good as those of the PyTorch version, each row for itself: the search is the same."""
    key, value = (tensor.double() @ turned.double() for tensor in x)
    codes, scale, value_codes, value_scale = found
    expected = encode_entries_reference(
        x[0][None, None], x[1][None, None], None, owners, mean, turned, *books, *map(list, FACTORS)
    )
    sizes = [tensor.square().sum(1) for tensor in (key, value)]
    if mean is not None:
        centred = key - mean.double()[owners] @ turned.double()
        shorter, longer = centred.norm(dim=1), key.norm(dim=1)
        clear = (shorter - longer).abs() > 1e-4 * longer
        assert torch.equal((scale > 0)[clear], (shorter <= longer)[clear])
        key = torch.where((scale > 0)[:, None], centred, key)
    for ours, theirs, exact, book, size in (
        ((codes, scale), expected[:2], key, books[0], sizes[0]),
        ((value_codes, value_scale), expected[2:], value, books[1], sizes[1]),
    ):
        assert ours[0].shape == theirs[0].shape and ours[0].dtype == torch.uint8 and ours[1].dtype == torch.float32
        assert not ours[1].isnan().any()
        off, best = errors(*ours, book, exact), errors(*theirs, book, exact)
        # a number within a fiftieth of a step of the middle may get the other level, here or there, and the scale is
        # fitted after that: one row comes out better and another one worse, all together the same
        assert (off <= 1.12 * best + 1e-6 * size).all()
        assert off.sum() <= 1.01 * best.sum() + 1e-6 * size.sum()
        half = ours[1].half().float()
        assert torch.equal(ours[1], torch.where(half.isfinite(), half, ours[1]))


@pytest.mark.parametrize("dtype,bits,dim,entries", list(combinations()), ids=str)
def test_codes_of_entries(no_reference, monkeypatch, dtype, bits, dim, entries):
    x = keys(entries, dim, dtype=dtype), draw(entries, dim, seed=1, dtype=dtype)
    owners = torch.arange(entries) % 3
    mean = torch.stack([x[0][owners == owner].float().mean(0) for owner in range(3)]).to(dtype)
    turned, books = rotation("hadamard", dim, 0, CPU), (levels(dim, bits[0]), levels(dim, bits[1]))
    found = encode_entries(x[0][None, None], x[1][None, None], None, owners, mean, turned, books, FACTORS)
    monkeypatch.undo()
    check(found, x, owners, mean, turned, books)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_equal_steps_and_no_mean(no_reference, monkeypatch, bits):
    x = keys(20, 64), draw(20, 64, seed=1)
    turned, books = rotation("dense", 64, 0, CPU), (levels(64, bits, "steps"),) * 2
    found = encode_entries(x[0][None, None], x[1][None, None], None, None, None, turned, books, FACTORS)
    monkeypatch.undo()
    check(found, x, None, None, turned, books)


def test_chosen_entries_are_read_where_they_are(no_reference, monkeypatch):
    """From views of a cache, in any order, and some twice."""
    whole = keys(2, 41, 3, 64).transpose(1, 2), draw(2, 3, 50, 64, seed=1)[:, :, 4:45]
    assert not any(tensor.is_contiguous() for tensor in whole)
    index = torch.randperm(2 * 3 * 41, generator=torch.Generator().manual_seed(0))[:70]
    index = torch.cat([index, index[:3]])
    owners = index // 41
    mean = whole[0].mean(2).flatten(0, 1)
    turned, books = rotation("hadamard", 64, 0, CPU), (levels(64, 4), levels(64, 3))
    found = encode_entries(*whole, index, owners, mean, turned, books, FACTORS)
    monkeypatch.undo()
    check(found, tuple(t.reshape(-1, 64)[index] for t in whole), owners, mean, turned, books)


@pytest.mark.parametrize("size", [1e-4, 1e7])
def test_extreme_numbers(no_reference, monkeypatch, size):
    """A scale that float16 cannot hold stays as it is."""
    x = size * keys(20, 64), size * draw(20, 64, seed=1)
    turned, books = rotation("hadamard", 64, 0, CPU), (levels(64, 4), levels(64, 4))
    found = encode_entries(x[0][None, None], x[1][None, None], None, None, x[0].mean(0, keepdim=True), turned, books,
                           FACTORS)  # fmt: skip
    monkeypatch.undo()
    check(found, x, torch.zeros(20, dtype=torch.long), x[0].mean(0, keepdim=True), turned, books)


def test_zeros_and_keys_that_are_the_mean(no_reference):
    mean = draw(1, 64)
    x = torch.cat([mean, torch.zeros(2, 64)])
    books = (levels(64, 4), levels(64, 4))
    turned = rotation("hadamard", 64, 0, CPU)
    _, scale, _, value_scale = encode_entries(
        x[None, None], torch.zeros_like(x)[None, None], None, None, mean, turned, books, FACTORS
    )
    tiny = torch.tensor([1e-17, 1e-19, 1e-25, 1e-38])[:, None] * draw(4, 64)
    for made in encode_entries(tiny[None, None], tiny[None, None], None, None, None, turned, books, FACTORS)[1::2]:
        assert not made[1:].any() and (made.abs() < 1e-16).all()
    # the mean is not quite removed: it was rotated in another order
    assert 0 < float(scale[0]) < 1e-6 and not scale[1:].any() and not value_scale.any()
    assert (scale[1:] <= 0).all()


def test_owners_behind_the_last_mean_use_it(no_reference, monkeypatch):
    x = keys(6, 64), draw(6, 64, seed=1)
    owners = torch.tensor([0, 0, 1, 1, 5, 9])
    mean = torch.stack([x[0][:2].mean(0), x[0][2:].mean(0)])
    turned, books = rotation("hadamard", 64, 0, CPU), (levels(64, 4), levels(64, 4))
    found = encode_entries(x[0][None, None], x[1][None, None], None, owners, mean, turned, books, FACTORS)
    monkeypatch.undo()
    check(found, x, owners.clamp(max=1), mean, turned, books)


@pytest.mark.parametrize("share", [4, 1])
def test_tiles_of_few_programs(no_reference, monkeypatch, share):
    """Of four tiles of keys and four of values every one is encoded, whoever does it, and as well as in float32."""
    from hf_kvcache.kernels.triton_ops import encode_entries as ours

    monkeypatch.setattr(ours, "SHARE", share)
    x = keys(200, 64, dtype=torch.bfloat16), draw(200, 64, seed=1, dtype=torch.bfloat16)
    owners = torch.arange(200) // 45
    mean = torch.stack([x[0][owners == owner].float().mean(0) for owner in range(5)]).bfloat16()
    turned, books = rotation("hadamard", 64, 0, CPU), (levels(64, 4), levels(64, 4))
    found = encode_entries(x[0][None, None], x[1][None, None], None, owners, mean, turned, books, FACTORS)
    monkeypatch.undo()
    expected = encode_entries_reference(
        x[0][None, None], x[1][None, None], None, owners, mean, turned, *books, *map(list, FACTORS)
    )
    exact = x[1].double() @ turned.double()
    off, best = (errors(*made[2:], books[1], exact).sum() for made in (found, expected))
    assert off <= 1.003 * best
    for place in (0, 2):
        ours_, theirs = (levels_of(made[place], torch.arange(16.0)) for made in (found, expected))
        # another scale of those tried may be as good, and gives other codes
        alike = ((ours_ - theirs).abs().amax(1) <= 1) & ((ours_ != theirs).sum(1) <= 3)
        assert alike.float().mean() > 0.97


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 8, 1000, 32768, 65535, 131071, 2**30, 2**31 - 1])
def test_division_by_a_product(divisor):
    from hf_kvcache.kernels.triton_ops.encode_entries import _reciprocal

    factor, shift = _reciprocal(divisor)
    most = 2**31 - 1
    numbers = {0, 1, most, *(near for k in (1, 2, 5, most // divisor) for near in (k * divisor - 1, k * divisor))}
    for number in (number for number in numbers if 0 <= number <= most):
        assert number * factor >> shift == number // divisor and number * factor < 2**64


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_constants_of_levels(dim, bits):
    """In float16 they give back the levels, and the place of a number up to a fiftieth of a step."""
    from hf_kvcache.kernels.triton_ops.placing import placing

    book = cubic(dim, bits)
    width, *pairs, curve, (factor, *numbers) = placing(tuple(book.tolist()), (0.9,))
    last, scale, offset, *numbers = (
        float(torch.tensor([pair], dtype=torch.int32).view(torch.float16)[0]) for pair in (*pairs, *numbers)
    )
    assert (width, last, factor) == (bits, 2**bits - 1, 0.9)
    t = (torch.arange(2**bits) + 1024) * scale + offset
    torch.testing.assert_close(-t * (numbers[4] + numbers[5] * t * t), 0.9 * book.float(), rtol=3e-3, atol=1e-3)
    middles = 0.9 * (book[1:] + book[:-1]) / 2
    argument = middles.abs() if curve == 3 else middles.square()
    places = middles * sum(number * argument**power for power, number in enumerate(numbers[:4])) * last
    assert (places - torch.arange(2**bits - 1) + (2**bits - 2) / 2).abs().max() < 0.02


def test_no_entries():
    x = torch.zeros(1, 2, 0, 64)
    books = (levels(64, 3), levels(64, 2))
    made = encode_entries(x, x, None, None, None, rotation("hadamard", 64, 0, CPU), books, FACTORS)
    assert [tuple(tensor.shape) for tensor in made] == [(0, 24), (0,), (0, 16), (0,)]


@pytest.mark.parametrize(
    "dim,book,dtype,factors",
    [
        (64, levels(64, 8), torch.float32, FACTORS[0]),
        (24, levels(24, 4), torch.float32, FACTORS[0]),
        (64, lloyd_max(64, 4), torch.float32, FACTORS[0]),
        (64, levels(64, 4), torch.float64, FACTORS[0]),
        (64, levels(64, 4), torch.float32, (0.8, 0.9, 1.0, 1.1)),
    ],
    ids=["8 bits", "head_dim 24", "any levels", "float64", "four factors"],
)
def test_what_has_no_kernel_is_computed_by_pytorch(dim, book, dtype, factors):
    x = draw(1, 1, 9, dim, dtype=dtype)
    arguments = (x, x, None, None, None, rotation("hadamard", dim, 0, CPU), book, book, list(factors), list(factors))
    found = torch.ops.hf_kvcache.encode_entries(*arguments)
    for ours, theirs in zip(found, encode_entries_reference(*arguments), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("center", [True, False])
def test_sealing_with_gaps_gathers_in_the_kernel(monkeypatch, center):
    """A segment of evicted heads: what it holds is as near to the keys as by the PyTorch version."""
    key, value = keys(2, 2, 60, 64), draw(2, 2, 60, 64, seed=1)
    keep = draw(2, 2, 60, seed=2) > torch.tensor([-1.0, 1.0])[:, None]
    key[~keep] = torch.nan
    codec, dense = TurboQuantCodec(4, 4, center=center), {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("HF_KVCACHE_BACKEND", backend)
        segment = Segment.seal(codec, DeviceStore(), key, value, keep)
        dense[backend] = segment.codec.decode(segment.payload(), segment.layout.owners)
        again = Segment.seal(codec, DeviceStore(), key, value, keep, like=segment, start=60)
        assert len(again.positions()) == int(keep.sum())
    monkeypatch.setenv("HF_KVCACHE_BACKEND", "reference")
    kept = keep.flatten().nonzero()[:, 0][segment.layout.order_on(CPU)]
    for place, exact in enumerate((key, value)):
        exact = exact.reshape(-1, 64)[kept]
        ours, theirs = (float((dense[backend][place] - exact).norm()) for backend in ("triton", "reference"))
        assert ours == pytest.approx(theirs, rel=5e-3)


def test_entries_that_are_not_finite_are_refused():
    key = keys(1, 2, 20, 64)
    key[0, 1, 3, 5] = torch.inf
    keep = torch.ones(1, 2, 20, dtype=torch.bool)
    keep[0, 0, 0] = False
    with pytest.raises(ValueError, match=r"cannot quantise a key with NaN or infinite numbers \(\d+ of 39 entries"):
        Segment.seal(TurboQuantCodec(4, 4), DeviceStore(), key, key.nan_to_num(posinf=0.0), keep)


@pytest.mark.parametrize("index", [None, torch.tensor([3, 1, 7])], ids=["all", "chosen"])
def test_operator_is_registered_as_torch_wants_it(index):
    x, books = draw(1, 2, 5, 64), [levels(64, 4).float()] * 2
    owners = torch.zeros(10 if index is None else 3, dtype=torch.long)
    arguments = (x, x, index, owners, draw(1, 64), rotation("hadamard", 64, 0, CPU), *books, [1.0], [0.9, 1.0])
    torch.library.opcheck(
        torch.ops.hf_kvcache.encode_entries.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
