"""TurboQuant: the paper's distortion and unbiasedness, and what the practical form adds to it."""

import math

import pytest
import torch

from hf_kvcache.codecs import PaperTurboQuantCodec, TurboQuantCodec
from hf_kvcache.codecs.codebooks import cubic, distortion
from hf_kvcache.codecs.rotation import rotation
from hf_kvcache.kernels.encode_entries import quantise


def unit_vectors(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual - exact).square().sum() / exact.square().sum())


# the paper


@pytest.mark.parametrize(("bits", "published"), [(2, 0.117), (3, 0.03), (4, 0.009)])
@pytest.mark.parametrize("dim", [64, 128])
def test_paper_distortion_on_unit_vectors(dim, bits, published):
    x = unit_vectors(4000, dim)
    codec = PaperTurboQuantCodec(bits, bits)
    key, value = codec.decode(codec.encode(x, x))
    for decoded in (key, value):
        error = relative_error(decoded, x)
        assert error == pytest.approx(distortion(dim, bits), rel=0.02)
        assert error == pytest.approx(published, rel=0.16)
        assert 4**-bits <= error <= math.sqrt(3) * math.pi / 2 * 4**-bits


@pytest.mark.parametrize(("bits", "published"), [(2, 0.56), (3, 0.18), (4, 0.047)])
def test_paper_inner_products_of_prod(bits, published):
    """Without bias, and with a variance of about published / D for unit vectors."""
    dim, count = 64, 400
    x, y = unit_vectors(count, dim), unit_vectors(count, dim, seed=1)
    exact = x @ y.T
    errors, slopes = [], []
    for seed in range(8):
        codec = PaperTurboQuantCodec(bits, 4, variant="prod", seed=10 * seed)
        inner = codec.decode(codec.encode(x, x))[0] @ y.T
        errors.append((inner - exact).square().mean())
        slopes.append((inner * exact).sum() / exact.square().sum())
    assert float(torch.stack(slopes).mean()) == pytest.approx(1.0, abs=0.02)
    assert float(torch.stack(errors).mean()) * dim == pytest.approx(published, rel=0.25)


def test_mse_shrinks_inner_products_and_prod_does_not():
    x = unit_vectors(2000, 64)
    mse, prod = (PaperTurboQuantCodec(2, 2, variant=variant) for variant in ("mse", "prod"))
    slope = [float((codec.decode(codec.encode(x, x))[0] * x).sum(1).mean()) for codec in (mse, prod)]
    assert slope[0] == pytest.approx(1 - distortion(64, 2), abs=0.01)
    assert slope[1] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_outlier_channels_get_the_extra_bit(bits):
    x = unit_vectors(2000, 64)
    x[:, 5:21] *= 10
    codec = PaperTurboQuantCodec(bits, bits, outlier_channels=16)
    decoded = codec.decode(codec.encode(x, x))[0]
    # each instance has the distortion of its own width
    for channels, width in ((slice(5, 21), math.ceil(bits)), (slice(21, 64), math.floor(bits))):
        assert relative_error(decoded[:, channels], x[:, channels]) == pytest.approx(distortion(64, width), rel=0.15)


def test_outlier_channels_must_fit():
    with pytest.raises(ValueError, match="multiple of 8 between 8 and 56 at head_dim 64, got 60"):
        PaperTurboQuantCodec(2.5, 4, outlier_channels=60).encode(torch.ones(3, 64), torch.ones(3, 64))
    with pytest.raises(ValueError, match=r"the bits of keys must be one of 2, 3, 4, got 2\.5"):
        PaperTurboQuantCodec(2.5, 4, variant="prod")
    with pytest.raises(ValueError, match="variant must be one of mse, prod, got 'qjl'"):
        PaperTurboQuantCodec(variant="qjl")


# the practical form


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_practical_is_at_least_as_near_as_the_paper(dim, bits):
    x = unit_vectors(3000, dim)
    x[:, 3] *= 5
    practical, paper = (
        codec.decode(codec.encode(x, x)) for codec in (TurboQuantCodec(bits, bits), PaperTurboQuantCodec(bits, bits))
    )
    for mine, theirs in zip(practical, paper, strict=True):
        assert relative_error(mine, x) <= relative_error(theirs, x)


def test_the_mean_of_an_owner_costs_nothing():
    x = unit_vectors(2000, 64)
    owners = torch.arange(2).repeat_interleave(1000)
    shifted = x + torch.where(owners[:, None] == 0, 5.0, -3.0)
    codec = TurboQuantCodec()
    decoded = codec.decode(codec.encode(shifted, x, owners), owners)[0]
    plain = codec.decode(codec.encode(x, x, owners), owners)[0]
    assert relative_error(decoded - (shifted - x), x) == pytest.approx(relative_error(plain, x), rel=0.05)


def test_a_sink_keeps_its_own_precision():
    """A small key among large ones: with the mean removed it would get the error of a large one."""
    key = 0.1 * unit_vectors(1, 64)
    key = torch.cat([key, 10 + unit_vectors(500, 64, seed=1)])
    codec = TurboQuantCodec()
    payload = codec.encode(key, key)
    assert payload["key_scale"][0] < 0 and bool((payload["key_scale"][1:] > 0).all())
    assert relative_error(codec.decode(payload)[0][0], key[0]) < 0.02


def test_keys_that_are_their_mean_come_back():
    key = unit_vectors(1, 64).expand(7, -1).contiguous()
    codec = TurboQuantCodec()
    torch.testing.assert_close(codec.decode(codec.encode(key, key))[0], key, rtol=1e-4, atol=1e-5)


def test_later_entries_may_use_earlier_means():
    """Sealing a block of the tail: the mean is the prompt's, and is not kept twice."""
    x = unit_vectors(300, 64) + 4
    codec = TurboQuantCodec()
    first = codec.encode(x[:200], x[:200])
    later = codec.encode(x[200:], x[200:], like=first)
    assert later["mean"] is first["mean"]
    assert relative_error(codec.decode(later)[0] - 4, x[200:] - 4) < 0.02
    joined = {name: first[name] if name == "mean" else torch.cat([first[name], later[name]]) for name in first}
    torch.testing.assert_close(codec.decode(joined)[0], torch.cat([codec.decode(p)[0] for p in (first, later)]))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_searched_scale_is_better_than_the_norm(bits):
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    levels = cubic(64, bits)
    norm_only = quantise(x, levels, (1.0,))[2].sum()
    searched = quantise(x, levels, (0.85, 0.925, 1.0, 1.075, 1.15))[2].sum()
    assert searched < norm_only
    codes, scales, errors = quantise(x, levels, (0.9, 1.0, 1.1))
    decoded = scales[:, None] * levels[codes.int()].float()
    torch.testing.assert_close((decoded - x).square().sum(1), errors, rtol=1e-3, atol=1e-4)


def test_queries_are_rotated_instead_of_keys():
    """The same numbers as decoding first, without the inverse rotation of a single key."""
    x, query = unit_vectors(256, 64) + 2, unit_vectors(3, 64, seed=2)[None, None]
    codec = TurboQuantCodec()
    payload = codec.encode(x, x)
    out, _ = codec.attend(payload, 0, (1, 1, 256), query, 1.0, 0.0)
    key, value = codec.decode(payload)
    torch.testing.assert_close(out[0, 0], (query[0, 0] @ key.T).softmax(-1) @ value, rtol=1e-5, atol=1e-5)
    assert not torch.equal(rotation("hadamard", 64, 0, x.device), torch.eye(64))
