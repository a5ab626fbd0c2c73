"""What the quantising codecs refuse, and how they say it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_kvcache.codecs.codebooks import MIN_DIM


def check_bits(name: str, bits: object, valid: Sequence[float]) -> None:
    """Raises when the bits of the numbers `name` are not one of `valid`."""
    if isinstance(bits, bool) or bits not in valid:
        raise ValueError(f"the bits of {name} must be one of {', '.join(map(str, valid))}, got {bits!r}")


def check_width(dim: int) -> None:
    """Raises when entries of so many numbers cannot be packed to whole bytes."""
    if dim % 8 or dim < MIN_DIM:
        raise ValueError(
            f"quantised codes need a head_dim that is a multiple of 8, got {dim}; use the dense codec for this model"
        )


def check_head_dim(key: Tensor, value: Tensor) -> None:
    """Raises when entries cannot be packed to whole bytes, or keys and values differ in width."""
    dim = key.shape[-1]
    check_width(dim)
    if value.shape[-1] != dim:
        raise ValueError(
            f"quantised codes need keys and values of one width, got {dim} and {value.shape[-1]}; "
            "use the dense codec for this model"
        )


def check_finite(**tensors: Tensor) -> None:
    """Raises when a tensor `[N, D]` holds NaN or infinity: no code stands for them."""
    for name, tensor in tensors.items():
        # needs no mask as large as the tensor; a sum that is not finite may itself have overflowed
        if bool(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite()):
            continue
        broken = int((~tensor.isfinite()).any(-1).sum())
        if broken:
            raise ValueError(
                f"cannot quantise a {name} with NaN or infinite numbers ({broken} of {len(tensor)} entries have some); "
                "the model overflowed: load it in bfloat16 or float32"
            )
