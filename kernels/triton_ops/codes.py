"""Turns words of packed codes into float16 numbers without a table and without converting an integer.

`code_attention.pack` puts the codes of neighbouring dims side by side, so a 16-bit word w of a row holds dims w * SLOTS
to w * SLOTS + SLOTS - 1, one in each *slot*:

    4 bits   4 slots of 4 bits
    2 bits   8 slots of 2 bits
    3 bits   8 slots of 2 bits, and in byte w of the second part of the row the top bits of the same dims

A code is or-ed into the mantissa of 1024.0 where it stands, one `lop3` for two elements, which gives 1024 + FACTOR *
code with FACTOR = 16 or 4^i by the place of the slot in its byte. Keys have the factor divided out of the query, values
out of the result, and the 1024 is subtracted once a row. 16-bit words lie in registers as float16 does, so that codes
reach the tensor cores without a dequantised tile in shared memory.

Every function has the assembly and, for the interpreter, a twin in plain Triton.
"""

import triton
import triton.language as tl


@triton.jit
def slots_4(words, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xEA;
            lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xEA;
            shr.b32 t, $4, 8;
            lop3.b32 $2, t, 0x000f000f, 0x64006400, 0xEA;
            lop3.b32 $3, t, 0x00f000f0, 0x64006400, 0xEA;
            }
            """,
            "=r,=r,=r,=r,r",
            args=[words],
            dtype=(tl.float16,) * 4,
            is_pure=True,
            pack=2,
        )
    else:
        return (
            _number(words & 0x000F),
            _number(words & 0x00F0),
            _number(words >> 8 & 0x000F),
            _number(words >> 8 & 0x00F0),
        )


@triton.jit
def slots_2(words, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            lop3.b32 $0, $8, 0x00030003, 0x64006400, 0xEA;
            lop3.b32 $1, $8, 0x000c000c, 0x64006400, 0xEA;
            lop3.b32 $2, $8, 0x00300030, 0x64006400, 0xEA;
            lop3.b32 $3, $8, 0x00c000c0, 0x64006400, 0xEA;
            shr.b32 t, $8, 8;
            lop3.b32 $4, t, 0x00030003, 0x64006400, 0xEA;
            lop3.b32 $5, t, 0x000c000c, 0x64006400, 0xEA;
            lop3.b32 $6, t, 0x00300030, 0x64006400, 0xEA;
            lop3.b32 $7, t, 0x00c000c0, 0x64006400, 0xEA;
            }
            """,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            args=[words],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )
    else:
        high = words >> 8
        return (
            _number(words & 0x0003),
            _number(words & 0x000C),
            _number(words & 0x0030),
            _number(words & 0x00C0),
            _number(high & 0x0003),
            _number(high & 0x000C),
            _number(high & 0x0030),
            _number(high & 0x00C0),
        )


@triton.jit
def slots_3(words, tops, ASM: tl.constexpr):
    """`words` hold the two lower bits, `tops` (16 bits wide, 8 of them used) the top bits of the same slots."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, u, y;
            shl.b32 u, $9, 2;
            lop3.b32 t, $8, 0x00030003, 0x64006400, 0xEA;
            lop3.b32 $0, u, 0x00040004, t, 0xEA;
            shl.b32 u, $9, 3;
            lop3.b32 t, $8, 0x000c000c, 0x64006400, 0xEA;
            lop3.b32 $1, u, 0x00100010, t, 0xEA;
            shl.b32 u, $9, 4;
            lop3.b32 t, $8, 0x00300030, 0x64006400, 0xEA;
            lop3.b32 $2, u, 0x00400040, t, 0xEA;
            shl.b32 u, $9, 5;
            lop3.b32 t, $8, 0x00c000c0, 0x64006400, 0xEA;
            lop3.b32 $3, u, 0x01000100, t, 0xEA;
            shr.b32 y, $8, 8;
            shr.b32 u, $9, 2;
            lop3.b32 t, y, 0x00030003, 0x64006400, 0xEA;
            lop3.b32 $4, u, 0x00040004, t, 0xEA;
            shr.b32 u, $9, 1;
            lop3.b32 t, y, 0x000c000c, 0x64006400, 0xEA;
            lop3.b32 $5, u, 0x00100010, t, 0xEA;
            lop3.b32 t, y, 0x00300030, 0x64006400, 0xEA;
            lop3.b32 $6, $9, 0x00400040, t, 0xEA;
            shl.b32 u, $9, 1;
            lop3.b32 t, y, 0x00c000c0, 0x64006400, 0xEA;
            lop3.b32 $7, u, 0x01000100, t, 0xEA;
            }
            """,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
            args=[words, tops],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )
    else:
        high = words >> 8
        return (
            _number(words & 0x0003 | tops << 2 & 0x0004),
            _number(words & 0x000C | tops << 3 & 0x0010),
            _number(words & 0x0030 | tops << 4 & 0x0040),
            _number(words & 0x00C0 | tops << 5 & 0x0100),
            _number(high & 0x0003 | tops >> 2 & 0x0004),
            _number(high & 0x000C | tops >> 1 & 0x0010),
            _number(high & 0x0030 | tops & 0x0040),
            _number(high & 0x00C0 | tops << 1 & 0x0100),
        )


@triton.jit
def _number(bits):
    """1024 + bits, in float16."""
    return (bits | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.constexpr_function
def slot_factor(j, bits):
    """By how much the code in slot j comes out too large."""
    return 16.0 ** (j % 2) if bits == 4 else 4.0 ** (j % 4)


@triton.constexpr_function
def slot_step(j, bits):
    return 1 / slot_factor(j, bits)


@triton.constexpr_function
def slot_middle(j, bits):
    """What the middle of the codes in slot j comes out as, times `slot_step`."""
    return 1024 / slot_factor(j, bits) + (2**bits - 1) / 2


@triton.jit
def numbers(words, tops, a, b, BITS: tl.constexpr, CUBIC: tl.constexpr, ASM: tl.constexpr):
    """The slots of words: 1024 + factor * code; or with CUBIC the levels t (a + b t²), t = code - (2^BITS - 1) / 2."""
    if BITS == 4:
        raw = slots_4(words, ASM)
    elif BITS == 3:
        raw = slots_3(words, tops, ASM)
    else:
        raw = slots_2(words, ASM)
    if CUBIC:
        found = ()
        for j in tl.static_range(16 // (2 if BITS == 3 else BITS)):
            # exact in float16, whose 11 bits do not hold 1024 and a half
            if slot_factor(j, BITS) == 1:
                t = (raw[j] - 1024) - (2**BITS - 1) / 2
            else:
                t = raw[j] * slot_step(j, BITS) - slot_middle(j, BITS)
            found = found + (t * (t * t * b + a),)
        return found
    else:
        return raw
