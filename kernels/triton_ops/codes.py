"""Turns words of packed codes into float16 numbers without a table and without converting an integer.

`code_attention.pack` puts the codes of neighbouring dims side by side, so a 16-bit word w of a row holds dims w * SLOTS
to w * SLOTS + SLOTS - 1, one in each *slot*:

    4 bits   4 slots of 4 bits
    2 bits   8 slots of 2 bits
    3 bits   8 slots of 2 bits, and in byte w of the second part of the row the top bits of the same dims

A code is or-ed into the mantissa of 1024.0 where it stands, one `lop3` for two elements, which gives 1024 + factor *
code with a factor of 16 or 4^i by the place of the slot in its byte. Keys have the factor divided out of the query,
values out of the result, and the 1024 is subtracted once a row. Cubic levels are computed from it at once, in packed
float16. 16-bit words lie in registers as float16 does, so that codes reach the tensor cores without a dequantised tile
in shared memory; that takes one piece of assembly, and so there is a twin in plain Triton for the interpreter.
"""

import struct

import triton
import triton.language as tl


@triton.constexpr_function
def slots(bits):
    """Codes in a word."""
    return 4 if bits == 4 else 8


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


@triton.constexpr_function
def slot_place(j, bits):
    """Where in its byte the lower bits of slot j begin."""
    return 4 * (j % 2) if bits == 4 else 2 * (j % 4)


def _assembly(bits: int, cubic: bool) -> str:
    """PTX for two words at once: outputs, then the words, the top bits (3 bits only), and a and b (cubic only)."""
    count = 4 if bits == 4 else 8
    words, tops = f"${count}", f"${count + 1}"
    a, b = (f"${count + (2 if bits == 3 else 1) + place}" for place in (0, 1))
    lines = [".reg .b32 high, low, top, one, two;", f"shr.b32 high, {words}, 8;"]
    for j in range(count):
        source = words if j < count // 2 else "high"
        place = 4 * (j % 2) if bits == 4 else 2 * (j % 4)
        middle = (2**bits - 1) / 2
        lines.append(f"lop3.b32 low, {source}, {_twice((15 if bits == 4 else 3) << place)}, 0x64006400, 0xEA;")
        if bits == 3:
            # the top bit of slot j, moved to where it stands above the two others
            move = place + 2 - j
            lines.append(f"{'shl' if move >= 0 else 'shr'}.b32 top, {tops}, {abs(move)};")
            lines.append(f"lop3.b32 low, top, {_twice(4 << place)}, low, 0xEA;")
        if cubic:
            # t, exactly: the 11 bits of float16 do not hold 1024 and a half
            if place == 0:
                lines += [f"mov.b32 one, {_halves(-1024)};", f"mov.b32 two, {_halves(-middle)};"]
                lines += ["add.rn.f16x2 low, low, one;", "add.rn.f16x2 low, low, two;"]
            else:
                step = 2.0**-place
                lines += [f"mov.b32 one, {_halves(step)};", f"mov.b32 two, {_halves(-1024 * step - middle)};"]
                lines += ["fma.rn.f16x2 low, low, one, two;"]
            lines += ["mul.rn.f16x2 one, low, low;", f"fma.rn.f16x2 one, one, {b}, {a};", "mul.rn.f16x2 low, low, one;"]
        lines.append(f"mov.b32 ${j}, low;")
    return "{\n" + "\n".join(lines) + "\n}"


def _twice(bits: int) -> str:
    """16 bits in both halves of a register."""
    return f"0x{bits * 0x10001:08x}"


def _halves(number: float) -> str:
    return _twice(int.from_bytes(struct.pack("<e", number), "little"))


STEPS_4, CUBIC_4 = tl.constexpr(_assembly(4, False)), tl.constexpr(_assembly(4, True))
STEPS_3, CUBIC_3 = tl.constexpr(_assembly(3, False)), tl.constexpr(_assembly(3, True))
STEPS_2, CUBIC_2 = tl.constexpr(_assembly(2, False)), tl.constexpr(_assembly(2, True))


@triton.constexpr_function
def constraints(bits, cubic):
    """Registers: those written, then those read."""
    return ",".join(["=r"] * slots(bits) + ["r"] * (1 + (bits == 3) + 2 * cubic))


@triton.jit
def numbers(words, tops, a, b, BITS: tl.constexpr, CUBIC: tl.constexpr, ASM: tl.constexpr):
    """The slots of `words`: 1024 + factor * code; or with CUBIC the levels t (a + b t²), t = code - (2^BITS - 1) / 2.

    `tops` (16 bits wide, 8 of them used) are the top bits of 3-bit codes; a and b are float16 scalars.
    """
    if ASM:
        if CUBIC:
            first = tl.broadcast_to(a, words.shape)
            second = tl.broadcast_to(b, words.shape)
            arguments = (words, tops, first, second) if BITS == 3 else (words, first, second)
        else:
            arguments = (words, tops) if BITS == 3 else (words,)
        STEPS: tl.constexpr = STEPS_4 if BITS == 4 else (STEPS_3 if BITS == 3 else STEPS_2)
        LEVELS: tl.constexpr = CUBIC_4 if BITS == 4 else (CUBIC_3 if BITS == 3 else CUBIC_2)
        return tl.inline_asm_elementwise(
            LEVELS if CUBIC else STEPS,
            constraints(BITS, CUBIC),
            args=arguments,
            dtype=(tl.float16,) * slots(BITS),
            is_pure=True,
            pack=2,
        )
    else:
        found = ()
        for j in tl.static_range(slots(BITS)):
            byte = words >> 8 if j >= slots(BITS) // 2 else words
            bits = byte & ((15 if BITS == 4 else 3) << slot_place(j, BITS))
            if BITS == 3:
                bits = bits | ((tops >> j & 1) << (slot_place(j, BITS) + 2))
            number = (bits | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
            if CUBIC:
                if slot_place(j, BITS) == 0:
                    t = (number - 1024) - (2**BITS - 1) / 2
                else:
                    t = number * slot_step(j, BITS) - slot_middle(j, BITS)
                number = t * (t * t * b + a)
            found = found + (number,)
        return found
