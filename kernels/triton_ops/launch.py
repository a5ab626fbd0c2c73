"""What the launchers share: how work is cut into stretches, and what they cannot take."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels.ragged_attention import LEAST, TILE, programs_of

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# as Triton reads it when the kernels are imported
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

LOG2E = 1.4426950408889634
# query rows of one program; more of them are further programs, which read the entries again
MOST_COLUMNS = 32


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is not below `number` and `least`."""
    return max(least, 1 << (number - 1).bit_length())


def columns_for(queries: int) -> int:
    """Query rows of a program: the tensor cores take 8 at least."""
    return min(power_of_two(queries, 8), MOST_COLUMNS)


def cut(runs: int, tokens: int, queries: int, device: torch.device, aligned: bool = False) -> tuple[int, int]:
    """How the runs of a rectangle are split.

    Args:
        runs, tokens, queries: how many there are; tokens and queries of each run.
        device: where.
        aligned: stretches end at multiples of `TILE` of all entries, so that a run which begins between two of them may
            need one more.

    Returns:
        stretches a run, and entries a stretch.
    """
    tiles = -(-tokens // TILE) + (1 if aligned and runs > 1 and tokens % TILE else 0)
    columns = -(-queries // columns_for(queries))
    length = max(LEAST, -(-runs * tiles * columns // programs_of(device)) * TILE)
    return -(-tiles * TILE // length), length


def known(*tensors: Tensor) -> bool:
    """Whether all tensors lie on one device and hold numbers that the kernels compute with."""
    types = (torch.float16, torch.bfloat16, torch.float32)
    return all(tensor.dtype in types for tensor in tensors) and len({tensor.device for tensor in tensors}) == 1


@triton.jit
def tanh_capped(scores, cap):
    """cap * tanh(scores / cap) for scores in powers of two, by the exponential that the hardware has."""
    return cap - 2 * cap / (1 + tl.exp2(scores * (2 * 1.4426950408889634 / cap)))
