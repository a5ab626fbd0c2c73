"""Arithmetic on two float16 numbers at once: an int32 holds a pair, and an instruction computes both.

Neither Triton nor its compilers pair float16 numbers up, so that every operation is a piece of assembly; and a twin of it
in plain Triton for the interpreter, which rounds as the assembly does.
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
    low = low.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
    high = high.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
    return low | (high << 16)


@triton.jit
def product(a, b):
    """a b."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", args=(a, b), dtype=tl.int32, is_pure=True, pack=1
        )
    return paired(low_of(a) * low_of(b), high_of(a) * high_of(b))


@triton.jit
def fused(a, b, c):
    """a b + c."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", args=(a, b, c), dtype=tl.int32, is_pure=True, pack=1
        )
    return paired(low_of(a) * low_of(b) + low_of(c), high_of(a) * high_of(b) + high_of(c))


@triton.jit
def saturated(a, b, c):
    """a b + c, but from 0 to 1; where it is not a number, 0."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f16x2 $0, $1, $2, $3;", "=r,r,r,r", args=(a, b, c), dtype=tl.int32, is_pure=True, pack=1
        )
    low, high = low_of(a) * low_of(b) + low_of(c), high_of(a) * high_of(b) + high_of(c)
    return paired(tl.minimum(tl.maximum(low, 0.0), 1.0), tl.minimum(tl.maximum(high, 0.0), 1.0))


@triton.jit
def added(a, b):
    """a + b."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r", args=(a, b), dtype=tl.int32, is_pure=True, pack=1
        )
    return paired(low_of(a) + low_of(b), high_of(a) + high_of(b))


@triton.jit
def total(pairs):
    """The sums of both numbers of all pairs of a row, in float32."""
    if ASSEMBLY:
        row = tl.reduce(pairs, 1, added)
        return low_of(row) + high_of(row)
    return tl.sum(low_of(pairs) + high_of(pairs), 1)
