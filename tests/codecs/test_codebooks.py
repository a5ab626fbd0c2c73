"""Codebooks and rotations: the law of a coordinate, the levels of least error for it, and bases that bring it about."""

import math

import pytest
import torch

from hf_kvcache.codecs.codebooks import cubic, distortion, lloyd_max
from hf_kvcache.codecs.rotation import rotation

CPU = torch.device("cpu")
DIMS = (8, 64, 80, 96, 112, 128, 192, 256)


def unit_vectors(count: int, dim: int) -> torch.Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


@pytest.mark.parametrize(("bits", "published"), [(1, 0.36), (2, 0.117), (3, 0.03), (4, 0.009)])
@pytest.mark.parametrize("dim", [64, 128, 1024])
def test_distortion_is_the_published_one(dim, bits, published):
    # printed with one or two digits
    assert distortion(dim, bits) == pytest.approx(published, rel=0.16)
    assert distortion(dim, bits) <= math.sqrt(3) * math.pi / 2 * 4**-bits
    assert distortion(dim, bits) >= 4**-bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_tend_to_those_of_the_normal_law(bits):
    published = {1: [0.7979], 2: [0.4528, 1.5104], 3: [0.2451, 0.7560, 1.3439, 2.1520]}
    published[4] = [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326]
    assert lloyd_max(100_000, bits)[2 ** (bits - 1) :].tolist() == pytest.approx(published[bits], abs=2e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [8, 64, 128])
def test_levels_are_the_means_of_their_cells(dim, bits):
    levels = lloyd_max(dim, bits)
    assert bool((levels.diff() > 0).all())
    assert torch.equal(levels, -levels.flip(0))
    x = (unit_vectors(200_000 // dim, dim) * dim**0.5).flatten()
    code = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    error = float((x - levels[code]).square().mean())
    assert error == pytest.approx(distortion(dim, bits), rel=0.05)
    if bits < 4:
        for index, level in enumerate(levels.tolist()):
            assert float(x[code == index].mean()) == pytest.approx(level, abs=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_cubic_levels_are_nearly_as_good(bits):
    x = (unit_vectors(4000, 64) * 8).flatten()
    errors = [
        float((x - levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]).square().mean())
        for levels in (lloyd_max(64, bits), cubic(64, bits))
    ]
    assert errors[1] <= 1.03 * errors[0]


def test_a_codebook_is_computed_once():
    assert lloyd_max(64, 4) is lloyd_max(64, 4)


def test_a_head_dim_without_a_law_is_refused():
    with pytest.raises(ValueError, match="head_dim must be at least 8, got 4"):
        lloyd_max(4, 2)


@pytest.mark.parametrize("kind", ["hadamard", "dense"])
@pytest.mark.parametrize("dim", DIMS)
def test_rotations_are_orthogonal(dim, kind):
    matrix = rotation(kind, dim, 0, CPU).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-6)
    assert not torch.equal(matrix, rotation(kind, dim, 1, CPU).double())
    assert rotation(kind, dim, 0, CPU) is rotation(kind, dim, 0, CPU)


@pytest.mark.parametrize("dim", DIMS)
def test_one_outlier_spreads_over_the_channels(dim):
    """What the codebook needs; exactly even for a power of two."""
    share = rotation("hadamard", dim, 0, CPU).square().max(dim=1).values
    odd = dim // (dim & -dim)
    assert bool((share <= odd / dim + 1e-6).all())


def test_an_unknown_rotation_is_refused():
    with pytest.raises(ValueError, match="hadamard, dense, got 'fourier'"):
        rotation("fourier", 8, 0, CPU)
