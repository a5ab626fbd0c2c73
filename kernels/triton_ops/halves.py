"""Arithmetic on two float16 numbers at once: an int32 holds a pair, and an instruction computes both.

Neither Triton nor its compilers pair float16 numbers up, so that every operation is a piece of assembly; and a twin of
it in plain Triton for the interpreter, which rounds as the assembly does.
"""

import struct

import triton
import triton.language as tl

from hf_kvcache.kernels.triton_ops.launch import INTERPRETED

ASSEMBLY = tl.constexpr(not INTERPRETED)


def twice(number: float) -> int:
    """A pair of one number, as an int32 has it."""
    half = int.from_bytes(struct.pack("<e", number), "little")
    return int.from_bytes(struct.pack("<HH", half, half), "little", signed=True)


ZEROS = tl.constexpr(0)
ONES = tl.constexpr(twice(1.0))


@triton.jit
def constant(pair: tl.constexpr):
    """A pair that is the same everywhere."""
    return tl.full([1, 1], pair, tl.int32)


@triton.jit
def low_of(pair):
    """The lower number of a pair, in float32."""
    return (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_of(pair):
    return ((pair >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def paired(low, high):
    """Of two numbers in float32."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", args=(low, high), dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        low = low.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
        return low | (high.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _twin(a, b, c, SATURATE: tl.constexpr):
    """a b + c, rounded once."""
    made = a
    # without a call for each half: those are what takes time in the interpreter
    for shift in tl.static_range(0, 32, 16):
        x = ((a >> shift) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        y = ((b >> shift) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        z = ((c >> shift) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        z = x * y + z
        if SATURATE:
            z = tl.minimum(tl.maximum(z, 0.0), 1.0)
        half = z.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
        made = half if shift == 0 else made | (half << shift)
    return made


@triton.jit
def product(a, b):
    """a b."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", args=(a, b), dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return _twin(a, b, tl.full([1, 1], ZEROS, tl.int32), False)


@triton.jit
def fused(a, b, c):
    """a b + c."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", args=(a, b, c), dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return _twin(a, b, c, False)


@triton.jit
def saturated(a, b, c):
    """a b + c, but from 0 to 1; where it is not a number, 0."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f16x2 $0, $1, $2, $3;", "=r,r,r,r", args=(a, b, c), dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return _twin(a, b, c, True)


@triton.jit
def added(a, b):
    """a + b."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r", args=(a, b), dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return _twin(a, tl.full([1, 1], ONES, tl.int32), b, False)


@triton.jit
def total(pairs):
    """The sums of both numbers of all pairs of a row, in float32."""
    if ASSEMBLY:
        row = tl.reduce(pairs, 1, added)
        return low_of(row) + high_of(row)
    else:
        # the interpreter would reduce one number after the other
        return tl.sum(low_of(pairs) + high_of(pairs), 1)
