"""Random rotations `[D, D]`: after one, the coordinates of any vector look like those of a random direction.

A codebook for the coordinates of a random direction then serves every vector, outlier channels included. Rows of keys
and of queries are rotated alike, so scores do not change.

They are kept for the process, and so never made in inference mode: autograd takes no tensor from there.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

ROTATIONS = ("hadamard", "dense")


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def rotation(kind: str, dim: int, seed: int, device: torch.device) -> Tensor:
    """An orthogonal float32 matrix R `[dim, dim]`; rotate rows by `x @ R`, undo it by `y @ R.T`.

    Args:
        kind: `"dense"`, the Q of the QR decomposition of a Gaussian matrix (TurboQuant's Π); or `"hadamard"`, random
            signs followed by a Hadamard matrix, which has no large entry, so that one outlier spreads evenly.
        dim: any number; a Hadamard matrix is joined with a small dense one for the odd factor of `dim`.
        seed: of the draw.
        device: to keep it on.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "dense":
        return _random_orthogonal(dim, generator).to(torch.float32).to(device)
    if kind != "hadamard":
        raise ValueError(f"rotation must be one of {', '.join(ROTATIONS)}, got {kind!r}")
    power = dim & -dim
    signs = torch.randint(0, 2, (dim, 1), generator=generator).double() * 2 - 1
    odd = _random_orthogonal(dim // power, generator)
    return (signs * torch.kron(odd, _hadamard(power))).to(torch.float32).to(device)


def _random_orthogonal(dim: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed: without the signs of R's diagonal, QR prefers some rotations."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).contiguous()


def _hadamard(dim: int) -> Tensor:
    """Sylvester's orthonormal Hadamard matrix for a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix
